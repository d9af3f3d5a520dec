"""Adapters as files: what is written, what is refused, and what an export says."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltaw.adapters import (
    DenseBase,
    adapt,
    adapter_names,
    export_lora,
    fold,
    load_adapter,
    save_adapter,
    save_folded,
    set_active,
    structures,
)
from deltaw.errors import CheckpointError, CompositionError, OptionError, TargetError, UnknownNameError


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, width)
        self.second = nn.Linear(width, 12)
        self.norm = nn.LayerNorm(12)
        self.classifier = nn.Linear(12, 3)

    def forward(self, x):
        return self.classifier(self.norm(self.second(torch.tanh(self.first(x)))))


TARGETS = ["first", "second"]
METHODS = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "pissa": {"rank": 4},
    "randlora": {"rank": 5},
    "hra": {"rank": 4},
    "svft": {"pattern": "random"},
}


def trained(method, also_train=("classifier", "norm.bias"), **options):
    model = adapt(Net(), method, TARGETS, also_train=also_train, **(METHODS[method] | options))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", ["auto", "deltaw"])
def test_what_was_trained_comes_back(method, format, tmp_path):
    model, x = trained(method), torch.randn(4, 12)
    out = save_adapter(model, tmp_path / "adapter", format=format)
    assert out == tmp_path / "adapter"
    assert not list(tmp_path.glob("*.partial"))
    expected = (
        "adapter_config.json" if format == "auto" and method in ("lora", "dora", "hra") else "deltaw_adapter.json"
    )
    assert (out / expected).is_file()
    other = load_adapter(Net(), out, name="mine")
    assert adapter_names(other) == ["mine"]
    assert torch.equal(other(x), model(x))
    trainable = {k for k, p in other.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias", "norm.bias"} <= trained_beside(trainable)
    again = save_adapter(other, tmp_path / "again", "mine", format)
    for file in out.glob("*.safetensors"):
        first, second = load_file(file), load_file(again / file.name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first)


def trained_beside(names):
    return {n for n in names if "structures" not in n}


def test_ranks_per_layer_and_dtype(tmp_path):
    model = Net().double()
    adapt(model, "lora", "first", rank=2)
    save_adapter(model, tmp_path / "a", format="deltaw")
    other = load_adapter(Net().double(), tmp_path / "a")
    assert next(structures(other)["first"].parameters()).dtype == torch.float64


def test_auto_chooses_peft_only_where_it_holds_the_same_parameters(tmp_path):
    for method, options in (("randlora", {"pairing": "peft"}), ("lora", {"scaling": "rslora"})):
        save_adapter(trained(method, **options), tmp_path / method)
        assert (tmp_path / method / "adapter_config.json").is_file()
    for method, options, reason in (
        ("randlora", {}, "pairing='peft'"),
        ("svft", {}, "does not have"),
        ("hra", {"gram_schmidt": True}, "starting reflection"),
    ):
        with pytest.raises(OptionError, match=reason):
            save_adapter(trained(method, **options), tmp_path / "refused", format="peft")
        assert not (tmp_path / "refused").exists()


def test_tied_weights_come_back_shared(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model, ids = adapt(Tied(), "lora", "table", rank=2), torch.arange(5)
    with torch.no_grad():
        structures(model)["table"].B.normal_()
    with pytest.raises(OptionError, match="tied"):
        save_adapter(model, tmp_path / "a", format="peft")
    save_adapter(model, tmp_path / "a")
    other = load_adapter(Tied(), tmp_path / "a")
    assert other.head.structures["default"] is other.table.structures["default"]
    assert torch.equal(other(ids), model(ids))


def edit(folder, change, file="deltaw_adapter.json"):
    config = json.loads((folder / file).read_text())
    change(config)
    (folder / file).write_text(json.dumps(config))


def retensor(folder, change, file="adapter.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


DELTAW_FAULTS = {
    "damaged json": (lambda f: (f / "deltaw_adapter.json").write_text("{"), "JSON"),
    "json list": (lambda f: (f / "deltaw_adapter.json").write_text("[]"), "list"),
    "other version": (lambda f: edit(f, lambda c: c.update(version=9)), "version"),
    "truncated": (lambda f: (f / "adapter.safetensors").write_bytes(b"\x10"), "truncated"),
    "no weights": (lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors"),
    "missing tensor": (
        lambda f: retensor(f, lambda t: t.pop("adapter/first.weight/lambda_")),
        "lacks tensor 'lambda_'",
    ),
    "unknown tensor": (lambda f: retensor(f, lambda t: t.update({"adapter/first.weight/Z": torch.ones(1)})), "unknown"),
    "stray module": (
        lambda f: retensor(f, lambda t: t.update({"adapter/other/A": torch.ones(1)})),
        "none of its modules",
    ),
    "wrong shape": (lambda f: retensor(f, lambda t: t.update({"adapter/first.weight/gamma": torch.ones(2)})), "shape"),
    "module gone": (lambda f: edit(f, lambda c: c["modules"].update({"third.weight": {}})), "third"),
    "another seed": (lambda f: edit(f, lambda c: c.update(seed=3)), "basis"),
    "another head": (
        lambda f: retensor(f, lambda t: t.update({"parameter/classifier.weight": torch.ones(4, 12)})),
        "classifier.weight",
    ),
}


@pytest.mark.parametrize("fault", DELTAW_FAULTS)
def test_a_faulty_folder_is_refused_and_the_model_stays(fault, tmp_path):
    save_adapter(trained("randlora"), tmp_path / "a")
    spoil, words = DELTAW_FAULTS[fault]
    spoil(tmp_path / "a")
    model, x = Net(), torch.randn(3, 12)
    expected = model(x)
    with pytest.raises(CheckpointError, match=words):
        load_adapter(model, tmp_path / "a")
    assert torch.equal(model(x), expected)
    assert adapter_names(model) == []
    assert all(p.requires_grad for p in model.parameters())


def test_another_architecture_a_taken_name_and_no_folder(tmp_path):
    save_adapter(trained("hra"), tmp_path / "peft")
    save_adapter(trained("svft"), tmp_path / "own")
    for folder in ("peft", "own"):
        with pytest.raises(CheckpointError, match="shape"):
            load_adapter(Net(width=20), tmp_path / folder)
    with pytest.raises(CheckpointError, match="lacks"):
        load_adapter(nn.Sequential(nn.Linear(3, 3)), tmp_path / "peft")
    model = load_adapter(Net(), tmp_path / "own")
    with pytest.raises(CompositionError, match="default"):
        load_adapter(model, tmp_path / "peft")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_adapter(Net(), tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="not empty"):
        save_adapter(model, tmp_path / "own")
    save_adapter(model, tmp_path / "own", overwrite=True)
    with pytest.raises(UnknownNameError, match="default"):
        save_adapter(model, tmp_path / "x", name="defualt")


PEFT_FAULTS = {
    "unknown method": (lambda f: edit(f, lambda c: c.update(peft_type="LORB"), PEFT), UnknownNameError, "LORA"),
    "biases": (lambda f: edit(f, lambda c: c.update(bias="all"), PEFT), CheckpointError, "bias='all'"),
    "experts": (
        lambda f: edit(f, lambda c: c.update(target_parameters=["x"]), PEFT),
        CheckpointError,
        "target_parameters",
    ),
    "residual": (
        lambda f: edit(f, lambda c: c.update(init_lora_weights="pissa_niter_4"), PEFT),
        CheckpointError,
        "twice",
    ),
    "no rank": (lambda f: edit(f, lambda c: c.pop("r"), PEFT), CheckpointError, "'r'"),
    "another rank": (lambda f: edit(f, lambda c: c.update(r=3), PEFT), CheckpointError, "rank"),
    "missing tensor": (
        lambda f: retensor(f, lambda t: t.pop("base_model.model.first.lora_A.weight"), SAFE),
        CheckpointError,
        "lora_A.weight",
    ),
    "missing module": (
        lambda f: retensor(f, lambda t: [t.pop(f"base_model.model.first.lora_{k}.weight") for k in "AB"], SAFE),
        CheckpointError,
        "no tensors for 'first'",
    ),
    "extra tensor": (
        lambda f: retensor(f, lambda t: t.update({"base_model.model.first.lora_E": torch.ones(4)}), SAFE),
        CheckpointError,
        "lora_E",
    ),
    "foreign tensor": (lambda f: retensor(f, lambda t: t.update({"x": torch.ones(4)}), SAFE), CheckpointError, "'x'"),
    "pickled": (
        lambda f: ((f / SAFE).unlink(), torch.save({}, f / "adapter_model.bin")),
        CheckpointError,
        "pickle",
    ),
}
PEFT, SAFE = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize("fault", PEFT_FAULTS)
def test_a_faulty_peft_folder_is_refused(fault, tmp_path):
    save_adapter(trained("lora"), tmp_path / "a", format="peft")
    spoil, error, words = PEFT_FAULTS[fault]
    spoil(tmp_path / "a")
    model = Net()
    with pytest.raises(error, match=words):
        load_adapter(model, tmp_path / "a")
    assert adapter_names(model) == []


def test_entries_of_a_newer_peft_are_warned_about_and_kept(tmp_path):
    save_adapter(trained("lora"), tmp_path / "a", format="peft")
    edit(tmp_path / "a", lambda c: c.update(use_magic=True), PEFT)
    with pytest.warns(UserWarning, match="use_magic"):
        model = load_adapter(Net(), tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / PEFT).read_text())["use_magic"] is True


def test_target_modules_as_peft_reads_them(tmp_path):
    """A list selects by suffix, one string is a regular expression for the whole name."""
    from deltaw.adapters.peft_format import matches

    assert matches(["query"], "encoder.layer.0.query")
    assert not matches(["query"], "encoder.my_query")
    assert matches(r".*layer\.[01]\.query", "encoder.layer.1.query")
    assert not matches("query", "encoder.query")
    assert not matches(None, "query")


def test_target_names_are_short_only_where_they_select_the_same(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Net(), Net()

    both = adapt(Twice(), "lora", "first", rank=2)
    save_adapter(both, tmp_path / "both")
    assert json.loads((tmp_path / "both" / PEFT).read_text())["target_modules"] == ["first"]
    one = adapt(Twice(), "lora", "a.first", rank=2)
    save_adapter(one, tmp_path / "one")
    assert json.loads((tmp_path / "one" / PEFT).read_text())["target_modules"] == ["a.first"]


# -- export ----------------------------------------------------------------------------------------------------------


def test_export_reports_the_head_and_the_error(tmp_path):
    model = trained("dora")
    report = export_lora(model, tmp_path / "lora", rank=3)
    assert report.head == ["classifier", "norm"]
    assert "save_folded" in report.notes[0]
    assert {r.module for r in report.rows} == set(TARGETS)
    for row in report.rows:
        sigma = torch.linalg.svdvals(
            structures(model)[row.module].delta(DenseBase(model.get_submodule(row.module).weight))
        )
        assert row.error == pytest.approx(float(sigma[3:].norm()), rel=1e-4)
        assert row.kept == pytest.approx(float(sigma[:3].square().sum() / sigma.square().sum()), rel=1e-4)
        assert not row.exact
    assert report.worst.kept == min(r.kept for r in report.rows)
    assert "first" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["rows"][0]["rank"] == 3


def test_export_by_energy_and_of_exact_factors(tmp_path):
    model = trained("lora")
    exact = export_lora(model, tmp_path / "exact")
    assert all(r.exact and r.rank == 4 and r.error == 0 for r in exact.rows)
    plain = load_adapter(Net(), tmp_path / "exact")
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "classifier" in k or "norm" in k}, strict=False
    )
    x = torch.randn(3, 12)
    torch.testing.assert_close(plain(x), model(x))
    energy = export_lora(trained("dora"), tmp_path / "energy", energy=0.9)
    for row in energy.rows:
        assert row.kept >= 0.9
    read = structures(load_adapter(Net(), tmp_path / "energy"))
    assert {m: s.rank for m, s in read.items()} == {r.module: r.rank for r in energy.rows}
    assert all(s.s == 1 for s in read.values())
    for bad in ({"rank": 0}, {"energy": 1.5}):
        with pytest.raises(OptionError):
            export_lora(model, tmp_path / "bad", **bad)


def test_an_exported_lora_is_read_by_peft(tmp_path):
    import peft

    model = trained("hra", also_train=())
    export_lora(model, tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "lora")
    x = torch.randn(3, 12)
    torch.testing.assert_close(theirs(x), model(x))


def test_folded_folder(tmp_path):
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForSequenceClassification

    model, x = trained("svft"), torch.randn(3, 12)
    expected = model(x)
    save_folded(model, tmp_path / "plain")
    fresh = Net()
    fresh.load_state_dict(load_file(tmp_path / "plain" / "model.safetensors"))
    torch.testing.assert_close(fresh(x), expected)
    assert torch.equal(model(x), expected), "the model itself is left alone"
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bert = BertForSequenceClassification(BertConfig(**small, vocab_size=30)).eval()
    ids = torch.randint(0, 30, (2, 6))
    adapt(bert, "hra", rank=2, also_train="classifier")
    with torch.no_grad():
        for s in structures(bert).values():
            s.U.normal_()
    set_active(bert, {})
    save_folded(bert, tmp_path / "bert", name="default")
    assert torch.equal(bert(ids).logits, bert(ids).logits)
    set_active(bert, "default")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    torch.testing.assert_close(again(ids).logits, bert(ids).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fold(bert)(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-5)


def test_experts_have_no_place_in_a_plain_lora(tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Module()
            self.experts.up_proj = nn.Parameter(torch.randn(3, 6, 4))

    rules = {"experts.up_proj": {"layout": "out_in", "kind": "expert-stack", "role": "mlp-in"}}
    model = adapt(Experts(), "lora", "experts.up_proj", rank=2, rules=rules)
    with pytest.raises(TargetError, match="expert"):
        export_lora(model, tmp_path / "lora")
    with pytest.raises(OptionError, match="ambiguous"):
        save_adapter(model, tmp_path / "a", format="peft")
    save_adapter(model, tmp_path / "a")
