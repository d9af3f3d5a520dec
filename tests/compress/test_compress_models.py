"""`compress` on real architectures: budget, outputs, both folders, and models left alone on errors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from deltaw.compress import CompressionReport, compress, load, save_compressed
from deltaw.compress.store import dense_state
from deltaw.errors import (
    CheckpointError,
    CompositionError,
    DataError,
    NonFiniteError,
    OptionError,
    TargetError,
    UnknownNameError,
)
from deltaw.models import FactoredLinear, capture, factored_ranks, find_sites

METHODS = ["svd", "svd-llm", "lord"]


def tiny(kind: str) -> nn.Module:
    """A small transformers model with random weights; the llama has grouped key-value heads and tied embeddings."""
    import transformers as t

    torch.manual_seed(0)
    if kind == "bert":
        config = t.BertConfig(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
        )
        model = t.BertModel(config)
    elif kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=32))
    else:
        config = t.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
        model = t.LlamaForCausalLM(config)
    for p in model.parameters():  # the default init of 0.02 makes every layer nearly silent
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        elif p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def batches(count: int = 3, size: int = 4) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(3)
    mask = torch.ones(size, 9, dtype=torch.long)
    mask[0, 6:] = 0
    return [{"input_ids": torch.randint(0, 50, (size, 9), generator=g), "attention_mask": mask} for _ in range(count)]


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batches(1)[0])
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_budget_report_and_both_folders(kind, method, tmp_path):
    model = tiny(kind)
    before = sum(p.numel() for p in model.parameters())
    weights = {s.module: s.shape for s in find_sites(model)}
    report = compress(model, method, 0.6, batches())
    total = sum(a * b for a, b in weights.values())
    assert {r["layer"] for r in report.rows} == set(weights)
    assert report.params_before == total
    assert report.params_after <= int(0.6 * total)
    counted = total - report.params_after
    assert before - sum(p.numel() for p in model.parameters()) == counted  # the report says what really happened
    assert report.model_params == (before, before - counted)
    assert report.model_bytes == (4 * before, 4 * (before - counted))
    for row in report.rows:
        assert row["rank"] is None or row["rank"] * sum(row["shape"]) < row["shape"][0] * row["shape"][1]
        assert row["output_error"] is None or 0 < row["output_error"] < 1
    json.dumps(report.as_dict())
    assert "encoder" in str(report) or "layer" in str(report)

    expected = output(model)
    save_compressed(model, tmp_path / "small")
    assert torch.equal(output(load(tmp_path / "small")), expected)
    assert factored_ranks(load(tmp_path / "small")) == factored_ranks(model)
    if kind == "llama" and method == "lord":
        with pytest.raises(CheckpointError, match="centred=False"):
            save_compressed(model, tmp_path / "plain", dense=True)
        assert not list(tmp_path.glob("plain*"))
        return
    save_compressed(model, tmp_path / "plain", dense=True)
    plain = plainly(kind, tmp_path / "plain")
    assert not any(isinstance(m, FactoredLinear) for m in plain.modules())
    assert torch.allclose(output(plain), expected, atol=2e-5)
    assert sum(p.numel() for p in plain.parameters()) == before


def plainly(kind: str, path) -> nn.Module:
    """As any user of transformers would: no deltaw involved, nothing missing or unexpected."""
    import transformers as t

    cls = t.AutoModel if kind == "bert" else t.AutoModelForCausalLM
    model, info = cls.from_pretrained(path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("allocation", ["energy", "loss"])
def test_allocations_keep_the_budget_and_lower_their_own_error(allocation):
    def run(kind):
        model = tiny("bert")
        # One layer is nearly low-rank, so that there is something to move.
        w = model.encoder.layer[0].intermediate.dense.weight
        w.data.copy_(w[:, :2] @ torch.randn(2, 24) + 1e-3 * w)
        return compress(model, "svd-llm", 0.5, batches(), allocation=kind)

    key = "relative_error" if allocation == "energy" else "error"
    ours, uniform = run(allocation), run("uniform")
    assert ours.params_after <= int(0.5 * ours.params_before)
    assert sum(r[key] ** 2 for r in ours.rows) < 0.8 * sum(r[key] ** 2 for r in uniform.rows)


def test_svd_llm_beats_svd_in_output_error_at_equal_ranks():
    a, b = (compress(tiny("bert"), m, 0.5, batches()) for m in ("svd", "svd-llm"))
    for x, y in zip(a.rows, b.rows, strict=True):
        assert x["rank"] == y["rank"]
        assert y["output_error"] <= x["output_error"] * (1 + 1e-6)
    assert all(x["output_error"] is None for x in compress(tiny("bert"), "svd", 0.5).rows)


def test_own_error_of_lord_is_the_output_error():
    model, data = tiny("bert"), batches()
    stats = capture(copy.deepcopy(model), find_sites(model), data, ("output_cov",))
    for row in compress(model, "lord", 0.5, data).rows:
        power = stats["output_cov", row["layer"]].diagonal().sum().item()
        assert row["error"] == pytest.approx(row["output_error"] * power**0.5, rel=1e-4)


def test_statistics_can_be_given_and_give_the_same():
    model = tiny("bert")
    stats = capture(model, find_sites(model), batches(), ("input_cov",))
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    compress(ours, "svd-llm", 0.6, stats)
    compress(theirs, "svd-llm", 0.6, batches())
    assert torch.equal(output(ours), output(theirs))
    with pytest.raises(DataError, match="output_cov"):
        compress(model, "lord", 0.6, stats)


def test_local_update_is_least_squares_on_the_compressed_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 12))
    data = [torch.randn(60, 16)]
    plain, updated = copy.deepcopy(model), copy.deepcopy(model)
    compress(plain, "svd-llm", 0.6, iter(data))
    compress(updated, "svd-llm", 0.6, iter(data), local_update=True)
    assert torch.allclose(plain[0](data[0]), updated[0](data[0]), atol=1e-5)  # the first layer was optimal already
    moved = torch.tanh(plain[0](data[0]))
    wanted = model[2](moved)
    errors = [(m[2](moved) - wanted).square().sum().item() for m in (plain, updated)]
    assert errors[1] < 0.999 * errors[0]
    z = torch.nn.functional.linear(moved, plain[2].first.weight)
    best = torch.linalg.lstsq(z.double(), (wanted - model[2].bias).double()).solution
    assert torch.allclose(updated[2].second.weight.double(), best.mT, atol=1e-4)


def test_tied_and_unreached_layers_stay_dense_and_are_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.idle = (nn.Linear(12, 12) for _ in range(4))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    model = Net()
    report = compress(model, "svd-llm", 0.8, [torch.randn(20, 12)])
    rows = {r["layer"]: r for r in report.rows}
    assert rows["a"]["rank"] is None
    assert "b.weight" in rows["a"]["reason"]
    assert "token" in rows["idle"]["reason"]
    assert rows["c"]["rank"] is not None
    assert report.params_before == 3 * 144
    assert report.params_after <= int(0.8 * 3 * 144)
    with pytest.raises(OptionError, match="ratio"):
        compress(Net(), "svd-llm", 0.5, [torch.randn(20, 12)])


def test_layers_read_directly_are_left_alone():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    report = compress(model, "svd", 0.5)
    assert {r["layer"] for r in report.rows} == {"layers.0.linear1", "layers.0.linear2"}
    assert len(report.skipped) == 2
    assert model(torch.randn(2, 3, 16)).shape == (2, 3, 16)


def test_dtype_and_ranks_to_a_multiple():
    model = tiny("bert").to(torch.bfloat16)
    report = compress(model, "svd", 0.7, multiple_of=4)
    assert all(r["rank"] is None or r["rank"] % 4 == 0 for r in report.rows)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report.params_after <= int(0.7 * report.params_before)


def test_ratio_one_changes_nothing():
    model = tiny("bert")
    expected = output(model)
    report = compress(model, "svd", 1.0)
    assert report.kept == 1.0
    assert torch.equal(output(model), expected)


def test_bad_input_leaves_the_model_as_it_was():
    model = tiny("bert")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    nan = copy.deepcopy(model)
    nan.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    for error, call in [
        (OptionError, lambda: compress(model, "svd", 0.0)),
        (OptionError, lambda: compress(model, "svd", 0.01)),
        (OptionError, lambda: compress(model, "svd", 0.5, allocation="best")),
        (OptionError, lambda: compress(model, "svd", 0.5, multiple_of=0)),
        (UnknownNameError, lambda: compress(model, "svdllm", 0.5, batches())),
        (UnknownNameError, lambda: compress(model, "svd", 0.5, centered=True)),
        (TargetError, lambda: compress(model, "svd", 0.5, targets="nothing")),
        (TargetError, lambda: compress(model, "svd", 0.5, targets="embedding")),
        (DataError, lambda: compress(model, "svd-llm", 0.5)),
        (DataError, lambda: compress(model, "lord", 0.5, [])),
        (NonFiniteError, lambda: compress(nan, "svd", 0.5)),
    ]:
        with pytest.raises(error):
            call()
    assert not factored_ranks(nan)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    compress(model, "svd", 0.6)
    with pytest.raises(CompositionError, match="factored already"):
        compress(model, "svd", 0.5)


def test_a_failing_refit_puts_the_dense_layers_back():
    model = tiny("bert")
    keys = model.state_dict().keys()
    data = batches()
    seen = []

    def stop(stage, done, total):
        if stage == "refit":
            seen.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, "svd-llm", 0.6, data, local_update=True, progress=stop)
    assert seen == [1]
    assert model.state_dict().keys() == keys


def test_saving_needs_a_config(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert isinstance(compress(model, "svd", 0.6), CompressionReport)
    for dense in (False, True):
        with pytest.raises(CheckpointError, match="config"):
            save_compressed(model, tmp_path / "out", dense)
    assert not list(tmp_path.iterdir())


def test_dense_state_of_an_uncompressed_model_is_its_state():
    model = tiny("gpt2")
    assert dense_state(model).keys() == model.state_dict().keys()
