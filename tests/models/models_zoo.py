"""Tiny random models of many architectures."""

from __future__ import annotations

import torch
import transformers as tf
from torch import nn

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 4}


def bert(labels: int = 2, layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(**{**SMALL, "num_hidden_layers": layers}, num_labels=labels)
    ).eval()


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, tie_word_embeddings=tied)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=1, n_head=4, vocab_size=50, n_positions=32)).eval()


def mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=4))


def qwen3_moe() -> nn.Module:
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GROUPED, num_experts=4, moe_intermediate_size=12))


def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    return tf.GptOssForCausalLM(tf.GptOssConfig(**GROUPED, num_local_experts=4)).eval()


def neox() -> nn.Module:
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL))


def phi3() -> nn.Module:
    return tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0))


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, vocab_size=50)
    )


def mamba() -> nn.Module:
    return tf.MambaForCausalLM(tf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4))


def modern_bert() -> nn.Module:
    return tf.ModernBertForSequenceClassification(tf.ModernBertConfig(**SMALL, pad_token_id=0))


def vit() -> nn.Module:
    config = {k: SMALL[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    return tf.ViTForImageClassification(tf.ViTConfig(**config, image_size=16, patch_size=4))


class FusedViT(nn.Module):
    """A block as timm writes it: fused qkv, class token, position table, patch convolution."""

    def __init__(self, dim: int = 12):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, dim))
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.head = nn.Linear(dim, 5)


class ConvNet(nn.Module):
    """Plain, grouped, depthwise and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(4, 2)


def token_batches(count: int = 3, vocab: int = 50, labels: bool = True) -> list[dict[str, torch.Tensor]]:
    """Padded batches of unequal lengths, the padding filled with tokens so that leaking it would show."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        lengths = torch.randint(1, 8, (4, 1), generator=generator)
        batch = {
            "input_ids": torch.randint(0, vocab, (4, 7), generator=generator),
            "attention_mask": (torch.arange(7) < lengths).long(),
        }
        if labels:
            batch["labels"] = torch.randint(0, 2, (4,), generator=generator)
        batches.append(batch)
    return batches
