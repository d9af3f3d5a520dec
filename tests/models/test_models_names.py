"""Roles read from names alone agree with those read from live models."""

from __future__ import annotations

import pytest
import torch

from deltaw.models import inventory, site_from_name

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


def build(kind: str) -> torch.nn.Module:
    import transformers as t

    text = {**SMALL, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    match kind:
        case "bert":
            return t.BertForSequenceClassification(t.BertConfig(**text))
        case "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(**text, num_key_value_heads=2))
        case "gpt2":
            config = t.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, bos_token_id=1, eos_token_id=2)
            return t.GPT2LMHeadModel(config)
        case "phi3":
            return t.Phi3ForCausalLM(t.Phi3Config(**text, num_key_value_heads=2))
        case "mixtral":
            return t.MixtralForCausalLM(t.MixtralConfig(**text, num_key_value_heads=2, num_local_experts=4))
    return t.ViTForImageClassification(t.ViTConfig(**SMALL, image_size=32, patch_size=8))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "phi3", "mixtral", "vit"])
def test_agrees_with_the_live_model(kind):
    model = build(kind)
    config = model.config.to_dict()
    for live in inventory(model):
        named = site_from_name(live.name, live.shape, config)
        assert (named.is_matrix, named.layout, named.split) == (live.is_matrix, live.layout, live.split), live.name
        if live.is_matrix or live.role in ("embedding", "head", "norm"):
            assert named.role == live.role, live.name


def test_the_bias_of_a_head_belongs_to_the_head():
    assert site_from_name("classifier.bias", (2,)).role == "head"
    assert site_from_name("encoder.layer.0.output.dense.bias", (2,)).role == "bias"


def test_a_fused_projection_without_config_is_not_guessed_when_interleaved():
    site = site_from_name("h.0.self_attention.query_key_value.weight", (96, 32), {"model_type": "bloom"})
    assert site.ambiguous
    assert not site.is_matrix
