"""The streaming engine: folders against dicts, kills and resumption, bad input, plans, what the output holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltaw.catalogue import get
from deltaw.errors import CheckpointError, NonFiniteError, OptionError, TargetError, UnknownNameError
from deltaw.merge import merge, plan
from deltaw.models import CheckpointWriter, open_checkpoint
from merge_helpers import stored

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.self_attn.qkv_proj.weight": (32, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.mlp.up_proj.bias": (24,),
    "model.layers.10.mlp.down_proj.weight": (16, 24),
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Base for seed 0, else a fine-tune of it."""
    g = torch.Generator().manual_seed(99)
    start = {n: torch.randn(*s, generator=g) for n, s in SHAPES.items()}
    g.manual_seed(seed)
    out = {n: (x + 0.1 * torch.randn(x.shape, generator=g) * bool(seed)).to(dtype) for n, x in start.items()}
    out["model.position_ids"] = torch.arange(8) + seed
    return out


def folder(path: Path, seed: int, *, dtype=torch.float32, config=CONFIG, shard=2000, **changes) -> Path:
    content = {k: v for k, v in {**tensors(seed, dtype), **changes}.items() if v is not None}
    with CheckpointWriter(path, max_shard_bytes=shard) as writer:
        for name, tensor in content.items():
            writer.write(name, tensor)
        if config is not None:
            writer.text("config.json", json.dumps(config))
    return path


@pytest.fixture
def family(tmp_path) -> list[Path]:
    paths = [folder(tmp_path / name, seed) for seed, name in enumerate(["base", "one", "two", "three"])]
    (paths[0] / "tokenizer.json").write_text('{"from": "base"}')
    (paths[1] / "tokenizer.json").write_text('{"from": "one"}')
    (paths[0] / "1_Pooling").mkdir()
    (paths[0] / "1_Pooling" / "config.json").write_text("{}")
    (paths[0] / "README.md").write_text("the base's card")
    (paths[0] / "optimizer.pt").write_bytes(b"x")
    return paths


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_output_folder_is_whole(family, tmp_path):
    base, *tuned = family
    out = merge(base, tuned, "ties", tmp_path / "out", max_shard_bytes=3000, density=0.4)
    assert out == tmp_path / "out"
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {"config.json", "tokenizer.json", "1_Pooling/config.json", "README.md"} <= files
    assert "optimizer.pt" not in files
    assert sum(f.endswith(".safetensors") for f in files) > 2
    assert json.loads((out / "tokenizer.json").read_text()) == {"from": "base"}
    assert json.loads((out / "config.json").read_text()) == CONFIG
    card = (out / "README.md").read_text()
    assert all(word in card for word in ("ties", '"density": 0.4', "one", "three", "base"))
    assert str(tmp_path) not in card
    assert not (tmp_path / "out.partial").exists()


def test_files_and_dtype_of_the_output(family, tmp_path):
    base, *tuned = family
    out = merge(base, tuned, "linear", tmp_path / "out", dtype="bfloat16", files="first")
    assert json.loads((out / "tokenizer.json").read_text()) == {"from": "one"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    kinds = {t.dtype for n, t in stored(out).items() if n != "model.position_ids"}
    assert kinds == {torch.bfloat16}
    bare = merge(base, tuned, "linear", tmp_path / "bare", files="none")
    assert [p.name for p in bare.iterdir()] == ["model.safetensors"]


def test_transformers_reads_the_output(tmp_path):
    import transformers as t

    config = t.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100, num_labels=3
    )
    models = []
    for i in range(3):
        torch.manual_seed(i)
        t.BertForSequenceClassification(config).save_pretrained(tmp_path / str(i))
        models.append(tmp_path / str(i))
    out = merge(models[0], models[1:], "iso-c", tmp_path / "out", heads="average")
    merged, info = t.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    one, two = (t.AutoModelForSequenceClassification.from_pretrained(m) for m in models[1:])
    assert torch.allclose(merged.classifier.weight, (one.classifier.weight + two.classifier.weight) / 2, atol=1e-7)


def test_integer_buffers_come_from_the_first_model(family):
    base, *tuned = family
    assert torch.equal(merge(base, tuned, "linear")["model.position_ids"], torch.arange(8) + 1)


def test_inputs_are_left_as_they_were():
    models = [tensors(i) for i in range(4)]
    for method in ("linear", "task-arithmetic", "ties", "iso-c"):
        merge(models[0], models[1:], method)
    assert all(same(m, tensors(i)) for i, m in enumerate(models))


def test_results_do_not_share_memory_with_inputs():
    base, tuned = tensors(0), tensors(1)
    merged = merge(base, [tuned], "linear", exclude="model.norm.weight", weights=[1])
    for t in merged.values():
        t.zero_()
    assert same(base, tensors(0))
    assert same(tuned, tensors(1))


def test_tied_names_are_merged_once(tmp_path):
    models = []
    for i in range(3):
        m = tensors(i)
        m["lm_head.weight"] = m["model.embed_tokens.weight"]
        models.append(m)
    base, *tuned = models
    merged = merge(base, tuned, "linear")
    assert merged["lm_head.weight"].data_ptr() == merged["model.embed_tokens.weight"].data_ptr()
    out = stored(merge(base, tuned, "linear", tmp_path / "out"))
    assert "lm_head.weight" not in out
    tuned[0]["lm_head.weight"] = tuned[0]["lm_head.weight"] + 1  # untied by training: two tensors now
    merged = merge(base, tuned, "linear")
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_a_head_tied_in_some_models_only_is_untied_in_the_output(tmp_path):
    tied = {**CONFIG, "tie_word_embeddings": True}
    base = folder(tmp_path / "base", 0, config=tied, **{"lm_head.weight": None})
    one = folder(tmp_path / "one", 1)
    two = folder(tmp_path / "two", 2, config=tied, **{"lm_head.weight": None})
    out = merge(base, [one, two], "task-arithmetic", tmp_path / "out", scale=0.5)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    _, o, t = (tensors(i) for i in range(3))
    expected = 0.5 * (o["lm_head.weight"] + t["model.embed_tokens.weight"])
    assert torch.allclose(stored(out)["lm_head.weight"], expected, atol=1e-6)


# -- kills and resumption --------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill_at(monkeypatch, k: int) -> None:
    """Make the k-th tensor written raise."""
    plain, count = CheckpointWriter.write, [0]

    def write(self, name, tensor):
        count[0] += 1
        if count[0] == k:
            raise Killed
        plain(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", write)


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("method", ["ties", "iso-c"])
def test_a_killed_merge_leaves_nothing_half_written_and_goes_on(family, tmp_path, monkeypatch, method, k):
    base, *tuned = family
    whole = merge(base, tuned, method, tmp_path / "whole", max_shard_bytes=3000)
    with monkeypatch.context() as patch:
        kill_at(patch, k)
        with pytest.raises(Killed):
            merge(base, tuned, method, tmp_path / "out", max_shard_bytes=3000)
    assert not (tmp_path / "out").exists()
    begun = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.partial").glob("*.safetensors")}
    assert begun or k < 6
    merge(base, tuned, method, tmp_path / "out", max_shard_bytes=3000)
    for p in whole.rglob("*"):
        if p.is_file():
            assert p.read_bytes() == (tmp_path / "out" / p.relative_to(whole)).read_bytes(), p.name
    assert len(list(whole.rglob("*"))) == len(list((tmp_path / "out").rglob("*")))


def test_finished_shards_are_not_computed_again(family, tmp_path, monkeypatch):
    base, *tuned = family
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            merge(base, tuned, "linear", tmp_path / "out", max_shard_bytes=3000)
    done: set[str] = set()
    for path in (tmp_path / "out.partial").glob("*.safetensors"):
        with open_checkpoint(path) as shard:
            done |= set(shard)
    assert 0 < len(done) < len(tensors(0))
    seen = []
    merge(base, tuned, "linear", tmp_path / "out", max_shard_bytes=3000, progress=lambda *step: seen.append(step))
    assert seen[-1][1] == len(tensors(0)) - len(done)


def test_another_recipe_does_not_continue_a_partial_folder(family, tmp_path, monkeypatch):
    base, *tuned = family
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            merge(base, tuned, "ties", tmp_path / "out", max_shard_bytes=3000)
    with pytest.raises(CheckpointError, match=r"density.*0\.2.*0\.3"):
        merge(base, tuned, "ties", tmp_path / "out", max_shard_bytes=3000, density=0.3)
    shutil.rmtree(tuned[0])
    folder(tuned[0], 7)
    with pytest.raises(CheckpointError, match="files"):
        merge(base, tuned, "ties", tmp_path / "out", max_shard_bytes=3000)
    merge(base, tuned, "ties", tmp_path / "out", max_shard_bytes=3000, resume=False)
    assert (tmp_path / "out").exists()


def test_a_kill_without_resume_leaves_nothing(family, tmp_path, monkeypatch):
    base, *tuned = family
    kill_at(monkeypatch, 7)
    with pytest.raises(Killed):
        merge(base, tuned, "linear", tmp_path / "out", max_shard_bytes=3000, resume=False)
    assert not list(tmp_path.glob("out*"))


def test_an_existing_output_is_kept_unless_overwritten(family, tmp_path):
    base, *tuned = family
    out = merge(base, tuned, "linear", tmp_path / "out")
    before = stored(out)
    with pytest.raises(CheckpointError, match="exists"):
        merge(base, tuned, "ties", out)
    assert same(stored(out), before)
    merge(base, tuned, "ties", out, overwrite=True)
    assert not same(stored(out), before)


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties", "iso-c"])
def test_non_finite_weights_name_model_and_tensor(tmp_path, family, value, method):
    base, one, two, _ = family
    bad = tensors(5)["model.layers.0.mlp.up_proj.weight"].clone()
    bad[3, 4] = value
    spoilt = folder(tmp_path / "spoilt", 5, **{"model.layers.0.mlp.up_proj.weight": bad})
    with pytest.raises(NonFiniteError, match=r"mlp\.up_proj\.weight.*spoilt.* 1 entries"):
        merge(base, [one, spoilt, two], method, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_of_the_base_or_of_a_model_without_weight_are_named(tmp_path, family, value):
    base, one, two, _ = family
    spoilt = folder(tmp_path / "spoilt", 5, **{"model.layers.0.mlp.up_proj.weight": torch.full((24, 16), value)})
    for given in ((spoilt, [one, two]), (base, [one, spoilt])):
        with pytest.raises(NonFiniteError, match=r"mlp\.up_proj\.weight.*spoilt.* 384 entries"):
            merge(*given, "task-arithmetic", weights=[1.0, 0.0])


def test_overflow_of_the_output_dtype_is_an_error():
    with pytest.raises(NonFiniteError, match=r"'w'.*70000.*float16"):
        merge(None, [{"w": torch.tensor([7e4])}], "linear", dtype="float16")


def test_large_finite_weights_are_not_taken_for_infinite():
    big = torch.full((10,), 3e38)
    assert torch.equal(merge(None, [{"w": big}], "linear")["w"], big)


def test_other_architectures_are_refused(family, tmp_path):
    base, one, *_ = family
    other = folder(tmp_path / "gemma", 4, config={**CONFIG, "model_type": "gemma"})
    with pytest.raises(CheckpointError, match=r"gemma.*'gemma'.*'llama'"):
        merge(base, [one, other], "linear")


def test_other_shapes_name_tensor_shapes_and_models(family, tmp_path):
    base, one, *_ = family
    name = "model.embed_tokens.weight"
    wide = folder(tmp_path / "wide", 4, **{name: torch.zeros(41, 16)})
    with pytest.raises(CheckpointError, match=r"embed_tokens.*\[40, 16\].*\[41, 16\] in .*wide.*vocabular"):
        merge(base, [one, wide], "linear")
    merged = merge(base, [one, wide], "linear", embeddings="base")
    assert torch.equal(merged[name], tensors(0)[name])
    deep = folder(tmp_path / "deep", 4, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(25, 16)})
    with pytest.raises(CheckpointError, match=r"up_proj.*\[25, 16\]"):
        merge(base, [deep], "linear")


def test_missing_and_extra_tensors_follow_the_rule():
    base, one, two = (tensors(i) for i in range(3))
    extra = "classifier.weight"
    one[extra], two[extra] = torch.ones(2, 16), torch.full((2, 16), 3.0)
    del one["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"2 tensors.*'classifier.weight'.*not in base.*missing='average'"):
        merge(base, [one, two], "ties")
    merged = merge(base, [one, two], "ties", missing="average")
    assert torch.equal(merged[extra], torch.full((2, 16), 2.0))
    assert torch.equal(merged["model.norm.weight"], two["model.norm.weight"])
    merged = merge(base, [one, two], "ties", missing="base")
    assert extra not in merged
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])
    assert extra not in merge(base, [one, two], "ties", missing="average", heads="drop")


def test_names_that_differ_by_a_prefix_are_explained():
    base = tensors(0)
    one = {f"bert.{n}": t for n, t in tensors(1).items()}
    with pytest.raises(CheckpointError, match=r"prefix 'bert\.'.*same model class"):
        merge(base, [one], "linear")


def test_quantised_and_pickled_models_are_refused(family, tmp_path):
    base, one, *_ = family
    packed = folder(tmp_path / "packed", 4, config={**CONFIG, "quantization_config": {"quant_method": "gptq"}})
    factored = folder(tmp_path / "factored", 4, config={**CONFIG, "deltaw_factored": {"layer": 2}})
    with pytest.raises(CheckpointError, match="factored is a factored model"):
        merge(None, [factored], "linear")
    with pytest.raises(CheckpointError, match=r"packed is quantised \(gptq\)"):
        merge(base, [one, packed], "linear")
    (tmp_path / "pickled").mkdir()
    torch.save(tensors(1), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused"):
        merge(base, [tmp_path / "pickled"], "linear")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"method": "tie"}, UnknownNameError, "ties"),
        ({"densty": 1}, UnknownNameError, "density"),
        ({"weights": [1]}, OptionError, "1 weights for 3"),
        ({"weights": [1, 1, float("nan")]}, OptionError, "finite"),
        ({"threads": 0}, OptionError, "threads"),
        ({"dtype": "int8"}, OptionError, "int8"),
        ({"dtype": "float33"}, OptionError, "float33"),
        ({"heads": "mean"}, OptionError, "average"),
        ({"missing": "skip"}, OptionError, "missing"),
        ({"files": "all"}, OptionError, "files"),
        ({"exclude": "model.laers.*"}, TargetError, "matches none"),
        ({"exclude": "re:("}, OptionError, "regular expression"),
        ({"models": []}, OptionError, "1 or more"),
        ({"models": "path"}, OptionError, "list of models"),
        ({"models": [3]}, OptionError, "int"),
        ({"models": [{"w": 3}]}, OptionError, "state dict"),
        ({"models": [{}]}, CheckpointError, "no tensors"),
        ({"base": None}, OptionError, "base"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    call = {"base": tensors(0), "models": [tensors(i) for i in (1, 2, 3)], "method": "ties", **change}
    with pytest.raises(error, match=text):
        merge(call.pop("base"), call.pop("models"), call.pop("method"), **call)


# -- plan ------------------------------------------------------------------------------------------------------


def test_plan_says_what_merge_does(family):
    base, *tuned = family
    dry = plan(base, tuned, "iso-c", heads="average", exclude=["model.layers.10"])
    actions = {r.name: r.action for r in dry.rows}
    assert actions == {
        "lm_head.weight": "average",
        "model.embed_tokens.weight": "other",
        "model.layers.0.mlp.up_proj.bias": "other",
        "model.layers.0.mlp.up_proj.weight": "matrix",
        "model.layers.0.self_attn.qkv_proj.weight": "matrix",
        "model.layers.10.mlp.down_proj.weight": "base",
        "model.norm.weight": "other",
        "model.position_ids": "first",
    }
    assert next(r for r in dry.rows if "qkv" in r.name).site.split == (16, 8, 8)
    data = json.loads(json.dumps(dry.as_dict()))
    assert data["counts"] == dry.counts
    assert data["output_bytes"] == sum(t.numel() * t.element_size() for t in tensors(0).values())
    text = str(dry)
    assert "qkv_proj" in text
    assert "3 blocks" in text


def test_plan_reads_no_weights(family, monkeypatch):
    base, *tuned = family
    monkeypatch.setattr("deltaw.models.Checkpoint.get", lambda *a, **k: pytest.fail("a tensor was read"))
    assert plan(base, tuned, "ties").rows


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties", "iso-c"])
def test_cost_formulas_count_the_passes(method):
    models = [tensors(i) for i in range(4)]
    reads = []

    class Counting(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    merge(models[0], [Counting(m) for m in models[1:]], method)
    card = get(method)
    name = "model.layers.0.mlp.up_proj.weight"
    assert reads.count(name) == 3 * card.evaluate("passes", T=3, **card.options)


def test_progress_reports_every_tensor():
    seen = []
    merge(tensors(0), [tensors(1)], "ties", progress=lambda *step: seen.append(step))
    stages = [s for *_, s in seen]
    assert any("survey" in s for s in stages)
    assert seen[-1] == (8, 8, "merging by ties")


def test_progress_shows_the_bytes_read_in_a_second(monkeypatch, capsys):
    from deltaw.merge import progress

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress.time, "monotonic", iter(range(10**6)).__next__)
    with progress.Progress(True) as bar:
        bar.begin("merging", 3)
        bar.advance(6_000_000)
        assert bar.bytes_per_second == pytest.approx(6e6 / 5, rel=0.8)
        bar.begin("again", 1)
        assert bar.bytes_per_second == 0
    assert "MB/s" in capsys.readouterr().err


def test_single_files_and_named_models(tmp_path):
    save_file(tensors(0), tmp_path / "base.safetensors")
    save_file(tensors(1), tmp_path / "one.safetensors")
    out = merge(tmp_path / "base.safetensors", {"mine": tmp_path / "one.safetensors"}, "linear")
    assert same(out, tensors(1))
    dry = plan({"w": torch.zeros(2)}, {"maths": {"w": torch.ones(2)}}, "linear")
    assert dry.models == ["maths"]
