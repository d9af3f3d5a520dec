"""`inspect` over modules, state dicts and folders; numbers against their definitions."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from deltaw.errors import CheckpointError, CompositionError, NonFiniteError, OptionError, TargetError
from deltaw.inspect import change, inspect
from deltaw.models import find_sites, get_parameter, load_pretrained


def models(kind: str = "bert") -> tuple[nn.Module, nn.Module]:
    """A model and a copy with a rank-2 change of two matrices."""
    import transformers as t

    torch.manual_seed(0)
    if kind == "bert":
        config = t.BertConfig(
            vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
        )
        base = t.BertModel(config)
    else:
        base = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=16))
    tuned = copy.deepcopy(base)
    sites = find_sites(tuned)
    for site in (sites[0], sites[-1]):
        p = get_parameter(tuned, site)
        a, b = torch.randn(2, p.shape[1]), torch.randn(p.shape[0], 2)
        p.data += 0.1 * b @ a
    return base, tuned


def test_numbers_of_one_matrix_by_definition():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(9, 6, generator=g, dtype=torch.float64)
    delta = torch.randn(9, 2, generator=g, dtype=torch.float64) @ torch.randn(2, 6, generator=g, dtype=torch.float64)
    found = change(base, base + delta, top_k=3)
    u, s, vh = torch.linalg.svd(base, full_matrices=False)
    ds = torch.linalg.svdvals(delta)
    p = ds[:2] / ds[:2].sum()
    assert found["singular_values"] == pytest.approx(ds.tolist(), abs=1e-12)
    assert found["effective_rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-9)
    assert found["stable_rank"] == pytest.approx(float(delta.square().sum() / ds[0] ** 2))
    assert found["relative_norm"] == pytest.approx(float(delta.norm() / base.norm()))
    assert found["spectral"] == pytest.approx(float(ds[0]))
    assert found["base_spectral"] == pytest.approx(float(s[0]))
    assert found["tuned_spectral"] == pytest.approx(float(torch.linalg.matrix_norm(base + delta, 2)))
    total = float(delta.square().sum())
    assert found["share_left"] == pytest.approx(float((u[:, :3].mT @ delta).square().sum()) / total)
    assert found["share_right"] == pytest.approx(float((delta @ vh[:3].mT).square().sum()) / total)
    assert found["share_both"] == pytest.approx(float((u[:, :3].mT @ delta @ vh[:3].mT).square().sum()) / total)
    whole = change(base, base + delta, top_k=9)
    assert whole["share_right"] == pytest.approx(1.0)
    json.dumps(found)


def test_an_unchanged_matrix():
    w = torch.randn(5, 7)
    found = change(w, w)
    assert found["effective_rank"] == found["stable_rank"] == found["relative_norm"] == found["intruders"] == 0
    assert found["share_left"] is None
    json.dumps(change(torch.zeros(3, 3), torch.zeros(3, 3)), allow_nan=False)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_modules_folders_and_state_dicts_agree(kind, tmp_path):
    base, tuned = models(kind)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    expected = inspect(base, tuned)
    for a, b in [
        (tmp_path / "base", tmp_path / "tuned"),
        (base.state_dict(), tuned.state_dict()),
        (base, tmp_path / "tuned"),
        (tmp_path / "base" / "model.safetensors", tuned),
    ]:
        found = inspect(a, b)
        ours, theirs = ({r["name"]: r for r in x.rows} for x in (found, expected))
        assert ours.keys() == theirs.keys()
        for name, row in ours.items():
            assert all(row[k] == theirs[name][k] for k in ("role", "shape", "depth", "intruders"))
            assert row["norm"] == pytest.approx(theirs[name]["norm"])
    changed = [r for r in expected.rows if r["norm"] > 1e-6]
    assert all(r["effective_rank"] <= 2.01 for r in changed)
    names = {r["name"] for r in expected.rows}
    if kind == "gpt2":  # the fused projection is taken apart, and Conv1D is read as [out, in]
        assert {"transformer.h.0.attn.c_attn[q]", "transformer.h.1.attn.c_attn[v]"} <= names
        shapes = {r["name"]: r["shape"] for r in expected.rows}
        assert shapes["transformer.h.0.mlp.c_fc"] == [96, 24]
    assert {r["depth"] for r in expected.rows if r["role"] != "pooler"} == {0, 1}


def test_a_bare_encoder_is_the_base_of_a_model_with_a_head():
    import transformers as t

    base, tuned = models()
    full = t.BertForSequenceClassification(base.config)
    full.bert.load_state_dict(tuned.state_dict(), strict=False)
    found, expected = inspect(base, full), inspect(base, tuned)
    assert [r["norm"] for r in found.rows] == pytest.approx([r["norm"] for r in expected.rows])
    assert found.rows[0]["parameter"].startswith("bert.")
    back = inspect(full, base)
    assert back.totals()["all"]["matrices"] == expected.totals()["all"]["matrices"]


def test_expert_stacks_are_taken_apart():
    g = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    config = {"hidden_size": 6, "model_type": "mixtral"}
    base = {name: torch.randn(3, 10, 6, generator=g)}
    tuned = {name: base[name].clone()}
    tuned[name][2, 5:] += torch.randn(5, 1, generator=g) @ torch.randn(1, 6, generator=g)

    import tempfile
    from pathlib import Path

    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        for part, state in (("a", base), ("b", tuned)):
            out = Path(folder) / part
            out.mkdir()
            save_file(state, out / "model.safetensors")
            (out / "config.json").write_text(json.dumps(config))
        found = inspect(Path(folder) / "a", Path(folder) / "b")
    assert len(found.rows) == 6
    changed = [r for r in found.rows if r["norm"] > 0]
    assert [(r["name"], r["role"]) for r in changed] == [(f"{name}[up][2]", "mlp-in")]
    assert changed[0]["stable_rank"] == pytest.approx(1.0, abs=1e-6)


def test_totals_table_json_and_plots(tmp_path):
    base, tuned = models()
    found = inspect(base, tuned, top_k=4, epsilon=0.6)
    totals = found.totals()
    assert totals["all"]["intruders"] == sum(r["intruders"] for r in found.rows)
    assert totals["all"]["matrices"] == len(found.rows) == sum(t["matrices"] for r, t in totals.items() if r != "all")
    assert all(len(r["cosines"]) == 4 for r in found.rows)
    text = str(found)
    assert "0.attention.self.query" in text
    assert "intruder dimensions (top 4, cosine < 0.6)" in " ".join(text.split())
    assert found.table("role").row_count == len(totals)
    found.save_json(tmp_path / "found.json")
    held = json.loads((tmp_path / "found.json").read_text())
    assert held["top_k"] == 4
    assert len(held["rows"]) == len(found.rows)
    for path in found.plots(tmp_path / "figures"):
        assert path.stat().st_size > 5000
    assert all(p.stat().st_size > 5000 for p in inspect(base, base).plots(tmp_path / "same"))


def test_selection_and_the_shared_cache():
    base, tuned = models()
    cache: dict = {}
    first = inspect(base, tuned, targets=["q", "mlp-out"], exclude="*.layer.1.*", cache=cache)
    assert {r["name"] for r in first.rows} == {"encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense"}
    assert set(cache) == {r["name"] for r in first.rows}
    again = inspect(base, tuned, targets=["q", "mlp-out"], exclude="*.layer.1.*", cache=cache)
    assert again.rows == first.rows


def test_rows_of_a_folder_come_in_model_order(tmp_path):
    from safetensors.torch import save_file

    save_file({f"layers.{i}.fc1.weight": torch.ones(3, 4) for i in range(12)}, tmp_path / "model.safetensors")
    assert [r["depth"] for r in inspect(tmp_path, tmp_path).rows] == list(range(12))


def test_bad_input(tmp_path):
    base, tuned = models()
    other = nn.Sequential(nn.Linear(3, 3))
    nan = copy.deepcopy(tuned)
    nan.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")
    wide = {k: torch.zeros(5, 5) if k.endswith("query.weight") else v for k, v in base.state_dict().items()}
    for error, call in [
        (CheckpointError, lambda: inspect(tmp_path / "none", tuned)),
        (CheckpointError, lambda: inspect(base, other)),
        (CheckpointError, lambda: inspect(base, wide)),
        (TargetError, lambda: inspect(base, tuned, targets="no.such.layer")),
        (NonFiniteError, lambda: inspect(base, nan)),
        (OptionError, lambda: inspect(base, 3)),
        (OptionError, lambda: inspect(base, tuned, top_k=0)),
        (OptionError, lambda: inspect(base, tuned, epsilon=-1)),
    ]:
        with pytest.raises(error):
            call()
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(copy.deepcopy(tuned), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(CompositionError, match="fold"):
        inspect(base, wrapped)


def test_minilm_is_inspected_whole():
    base = load_pretrained("all-minilm-l6-v2")
    tuned = {k: v + 1e-3 * torch.randn_like(v) if v.ndim == 2 else v for k, v in base.state_dict().items()}
    found = inspect("all-minilm-l6-v2", tuned)
    assert len(found.rows) == 37
