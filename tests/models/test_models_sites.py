"""The inventory: every matrix of a model with its role, orientation and blocks."""

import models_zoo as zoo
import pytest
import torch
from torch import nn

from deltaw.errors import OptionError, TargetError, UnknownNameError
from deltaw.models import (
    FactoredLinear,
    Site,
    find_sites,
    get_parameter,
    install_factored,
    inventory,
    qkv_split,
    site_from_name,
    tied_groups,
)


def roles(model: nn.Module) -> dict[str, str]:
    return {s.name: s.role for s in inventory(model)}


def by_end(model: nn.Module, end: str) -> Site:
    found = [s for s in inventory(model) if s.name.endswith(end)]
    assert len(found) == 1, [s.name for s in found]
    return found[0]


@pytest.mark.parametrize(
    "make",
    [zoo.bert, zoo.llama, zoo.gpt2, zoo.mixtral, zoo.gpt_oss, zoo.t5, zoo.mamba, zoo.modern_bert, zoo.vit, zoo.neox],
)
def test_every_parameter_stands_once_and_in_order(make):
    model = make()
    assert [s.name for s in inventory(model)] == [n for n, _ in model.named_parameters()]
    for site in inventory(model):
        p = get_parameter(model, site)
        assert p is model.get_parameter(site.name)
        assert site.shape == tuple(p.shape)
        assert site.role != "unknown", site
        if site.is_matrix:
            views = site.views(p.detach())
            assert sum(v.numel() for v in views) == p.numel()
            assert all(v.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for v in views)
            assert torch.equal(site.from_matrix(site.as_matrix(p)), p)


def test_bert_roles():
    found = roles(zoo.bert())
    layer = "bert.encoder.layer.0."
    expected = {
        "attention.self.query": "q",
        "attention.self.key": "k",
        "attention.self.value": "v",
        "attention.output.dense": "o",
        "intermediate.dense": "mlp-in",
        "output.dense": "mlp-out",
    }
    assert {k: found[f"{layer}{k}.weight"] for k in expected} == expected
    assert found["bert.pooler.dense.weight"] == "pooler"
    assert found["classifier.weight"] == "head"
    assert found["bert.embeddings.token_type_embeddings.weight"] == "embedding"
    assert found[f"{layer}output.LayerNorm.weight"] == "norm"
    assert found[f"{layer}output.dense.bias"] == "bias"


def test_grouped_query_attention_and_gated_mlp():
    found = [(s.role, s.matrix_shape) for s in find_sites(zoo.llama())]
    assert found == [
        ("q", (16, 16)),
        ("k", (8, 16)),
        ("v", (8, 16)),
        ("o", (16, 16)),
        ("mlp-gate", (32, 16)),
        ("mlp-in", (32, 16)),
        ("mlp-out", (16, 32)),
    ]
    fused = {s.role: s.split for s in find_sites(zoo.phi3())}
    assert fused["qkv"] == (16, 8, 8)
    assert fused["mlp-gate-up"] == (32, 32)


def test_gpt2_is_stored_transposed():
    model = zoo.gpt2()
    site = by_end(model, "c_attn.weight")
    assert (site.kind, site.layout, site.shape, site.matrix_shape) == ("conv1d", "in_out", (16, 48), (48, 16))
    x, module = torch.randn(3, 16), model.transformer.h[0].attn.c_attn
    q, k, v = (x @ w.T for w in site.views(module.weight))
    torch.testing.assert_close(torch.cat([q, k, v], -1) + module.bias, module(x))


def test_tied_embedding_is_one_site():
    model = zoo.gpt2()
    site = inventory(model)[0]
    assert (site.role, site.tied) == ("embedding", ("lm_head.weight",))
    assert tied_groups(model) == [("transformer.wte.weight", "lm_head.weight")]
    assert tied_groups(zoo.llama(tied=False)) == []
    assert len(tied_groups(zoo.t5())[0]) == 4
    copy = zoo.llama(tied=False)
    copy.lm_head.weight.data = copy.model.embed_tokens.weight.data  # one storage, two parameters: not tied
    assert tied_groups(copy) == []


@pytest.mark.parametrize(("make", "out"), [(zoo.mixtral, 32), (zoo.qwen3_moe, 12)])
def test_expert_stacks_and_routers(make, out):
    model = make()
    up, down = by_end(model, "experts.gate_up_proj"), by_end(model, "experts.down_proj")
    assert (up.kind, up.layout, up.matrix_shape, up.split) == ("expert-stack", "out_in", (2 * out, 16), (out, out))
    assert (down.layout, down.matrix_shape, down.interleaved) == ("out_in", (16, out), False)
    assert by_end(model, "mlp.gate.weight").role == "router"


def test_gpt_oss_stacks_are_transposed_and_their_gate_and_up_rows_alternate():
    model = zoo.gpt_oss()
    experts = model.model.layers[0].mlp.experts
    up, down = by_end(model, "experts.gate_up_proj"), by_end(model, "experts.down_proj")
    assert (up.layout, up.split, up.interleaved) == ("in_out", (32, 32), True)
    assert by_end(model, "gate_up_proj_bias").role == "bias"
    x = torch.randn(5, 16)
    gate, lift = (x @ w[1].T for w in up.views(experts.gate_up_proj))
    both = x @ experts.gate_up_proj[1]
    torch.testing.assert_close(gate, both[:, ::2])  # as modeling_gpt_oss reads them
    torch.testing.assert_close(lift, both[:, 1::2])
    assert down.matrix_shape == (16, 32)


def test_multihead_attention_and_recurrent_layers():
    found = {s.name: s for s in inventory(nn.TransformerEncoderLayer(16, 4, 32))}
    assert found["self_attn.in_proj_weight"].split == (16, 16, 16)
    assert found["self_attn.out_proj.weight"].role == "o"
    uneven = {s.name: s.role for s in inventory(nn.MultiheadAttention(8, 2, kdim=4, vdim=6))}
    assert [uneven[f"{r}_proj_weight"] for r in "qkv"] == ["q", "k", "v"]
    lstm = {s.name: s for s in inventory(nn.LSTM(4, 4))}
    assert lstm["weight_ih_l0"].ambiguous  # four gates in one matrix: no rule, so no guess


def test_fused_vit():
    found = {s.name: s for s in inventory(zoo.FusedViT())}
    assert found["attn.qkv.weight"].split == (12, 12, 12)
    assert [found[n].role for n in ("cls_token", "pos_embed", "head.weight", "attn.proj.weight")] == [
        "embedding",
        "embedding",
        "head",
        "o",
    ]
    assert found["patch_embed.weight"].matrix_shape == (12, 48)


def test_convolutions():
    found = {s.name: s for s in inventory(zoo.ConvNet())}
    assert (found["stem.weight"].role, found["stem.weight"].matrix_shape) == ("conv", (8, 27))
    assert found["grouped.weight"].split == (4, 4)
    assert found["depthwise.weight"].role == "vector"
    assert found["up.weight"].ambiguous
    assert found["bn.weight"].role == "norm"


def test_state_space_parameters_are_no_matrices():
    found = roles(zoo.mamba())
    assert found["backbone.layers.0.mixer.A_log"] == "vector"
    assert found["backbone.layers.0.mixer.conv1d.weight"] == "vector"
    assert found["backbone.layers.0.mixer.in_proj.weight"] == "linear"


def test_ambiguous_is_flagged_never_guessed():
    site = by_end(zoo.neox(), "query_key_value.weight")
    assert site.role == "qkv"
    assert site.ambiguous
    assert site.split == ()
    assert not site.is_matrix  # an optimizer must ask
    assert site.name in [s.name for s in find_sites(zoo.neox())]  # as one matrix it can be adapted
    grouped = nn.ModuleDict({"qkv": nn.Linear(8, 12)})  # 12 = (q 8) + 2 + 2, or three times 4
    assert inventory(grouped)[0].ambiguous
    square = nn.Module()
    square.experts = nn.Module()
    square.experts.down_proj = nn.Parameter(torch.zeros(2, 8, 8))
    assert inventory(square)[0].ambiguous
    odd = nn.Module()
    odd.thing = nn.Parameter(torch.zeros(3, 4))
    assert inventory(odd)[0].role == "unknown"


def test_rules_override():
    model = nn.ModuleDict({"qkv": nn.Linear(8, 12)})
    site = inventory(model, {"qkv.weight": {"role": "qkv", "split": [8, 2, 2]}})[0]
    assert (site.split, site.ambiguous, site.is_matrix) == ((8, 2, 2), False, True)
    odd = nn.Module()
    odd.thing = nn.Parameter(torch.zeros(3, 4))
    assert find_sites(odd, rules={"thing": {"role": "linear", "layout": "in_out"}})[0].matrix_shape == (4, 3)
    plain = inventory(zoo.phi3(), {"role:qkv": {"role": "linear"}})
    assert all(s.split == () for s in plain if s.reason.startswith("rule"))
    with pytest.raises(OptionError, match="add up to the 12 rows"):
        inventory(model, {"qkv.weight": {"split": [8, 8]}})
    with pytest.raises(TargetError, match="matches no parameter"):
        inventory(model, {"kqv.*": {"role": "qkv"}})
    with pytest.raises(UnknownNameError, match="did you mean 'split'"):
        inventory(model, {"qkv.weight": {"splits": [8, 2, 2]}})
    with pytest.raises(UnknownNameError, match="role"):
        inventory(model, {"qkv.weight": {"role": "kvq"}})


def test_selection():
    model = zoo.bert(layers=2)
    assert len(find_sites(model, "query")) == 2
    assert len(find_sites(model, ["q", "role:v"])) == 4
    assert len(find_sites(model, "*.layer.1.*")) == 6  # LayerNorm gains and biases are no weights
    assert len(find_sites(model, r"re:.*layer\.0\.(intermediate|output)\.dense")) == 2
    assert len(find_sites(model, exclude="pooler")) == 12
    assert [s.role for s in find_sites(model, "classifier")] == ["head"]
    assert all(s.role not in ("embedding", "head", "norm", "bias") for s in find_sites(model))
    order = [s.name for s in find_sites(model, ["v", "q"])]
    assert order == [n for n, _ in model.named_parameters() if n in order]
    with pytest.raises(TargetError, match="'query'"):
        find_sites(model, "quary")
    with pytest.raises(TargetError, match="exclude 'quary'"):
        find_sites(model, exclude="quary")
    with pytest.raises(TargetError, match="leave no matrix"):
        find_sites(model, "q", exclude="query")
    with pytest.raises(OptionError, match="not a regular expression"):
        find_sites(model, "re:(")
    assert find_sites(zoo.llama(), exclude="role:pooler")  # a role the model lacks is no mistake


def test_qkv_split():
    config = zoo.llama().config
    assert qkv_split(32, config) == (16, 8, 8)
    assert qkv_split(48, config) is None
    assert qkv_split(48, None) is None


def test_structures_factored_and_peft_layers():
    class Diagonal(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(3, 4))})

        def parameter_kinds(self):
            return {"scales.a": "diagonals"}

    model = nn.ModuleDict({"query": nn.Linear(8, 8), "structure": Diagonal()})
    site = inventory(model)[-1]
    assert (site.role, site.kind, site.is_matrix) == ("adapter", "diagonals", False)

    bert = zoo.bert()
    name = "bert.encoder.layer.0.attention.self.query"
    install_factored(bert, {name: (torch.randn(16, 2), torch.randn(2, 16), None)})
    assert isinstance(bert.get_submodule(name), FactoredLinear)
    assert [s.name for s in find_sites(bert, "role:q")] == [f"{name}.first.weight", f"{name}.second.weight"]

    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(zoo.llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    found = {s.name: s.role for s in inventory(wrapped)}
    base = "base_model.model.model.layers.0.self_attn.q_proj."
    assert found[base + "base_layer.weight"] == "q"
    assert found[base + "lora_A.default.weight"] == "adapter"
    assert found["base_model.model.lm_head.weight"] == "head"


@pytest.mark.parametrize(
    "make", [zoo.bert, zoo.llama, zoo.gpt2, zoo.mixtral, zoo.qwen3_moe, zoo.gpt_oss, zoo.phi3, zoo.neox, zoo.t5]
)
def test_names_alone_agree_with_the_live_model(make):
    """Work on checkpoints sees the same matrices, orientations and blocks as work on modules."""
    model = make()
    config = model.config.to_dict()
    for site in [s for s in inventory(model) if len(s.shape) >= 2]:
        guess = site_from_name(site.name, site.shape, config)
        same = ("role", "layout", "split", "interleaved", "ambiguous", "matrix_shape")
        assert {k: getattr(guess, k) for k in same} == {k: getattr(site, k) for k in same}, site.name


def test_a_planted_shape_rule_is_caught():
    """Deciding by the number of dimensions alone, as many routers do, must fail these tests."""
    by_shape = {n for n, p in zoo.gpt2().named_parameters() if p.ndim == 2}
    assert by_shape != {s.name for s in find_sites(zoo.gpt2())}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= by_shape
