"""Captured moments against direct float64 sums."""

import sys
import weakref

import models_zoo as zoo
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltaw.errors import CheckpointError, DataError, NonFiniteError, OptionError, TargetError, UnknownNameError
from deltaw.models import Statistics, capture, find_sites
from deltaw.models.statistics import Moments

ALL = ("input_cov", "output_cov", "grad_cov")


def record(model, names, batches, loss=lambda out: out.loss):
    """Inputs, outputs and output gradients of unmasked tokens, in float64, taken with hooks of the test's own."""
    rows = {n: ([], [], []) for n in names}
    for batch in batches:
        keep = batch["attention_mask"].bool()

        def pick(t, keep=keep):
            return (t[keep] if t.ndim == 3 else t).detach().double()

        handles, outputs = [], {}
        for n in names:

            def hook(module, args, out, n=n, outputs=outputs):
                rows[n][0].append(pick(args[0]))
                rows[n][1].append(pick(out))
                out.retain_grad()
                outputs[n] = out

            handles.append(model.get_submodule(n).register_forward_hook(hook))
        loss(model(**batch)).backward()
        for n in names:
            rows[n][2].append(pick(outputs[n].grad))
        for h in handles:
            h.remove()
    model.zero_grad()
    return {n: tuple(torch.cat(part) for part in parts) for n, parts in rows.items()}


def second(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("make", [zoo.bert, zoo.llama, zoo.gpt2])
def test_equals_direct_sums_with_masked_tokens(make):
    model = make().double()
    batches = zoo.token_batches()
    if make is not zoo.bert:
        batches = [{**b, "labels": b["input_ids"]} for b in batches]
    sites = find_sites(model)
    names = [s.module for s in sites]
    want = record(model, names, batches)
    got = capture(model, sites, batches, kinds=ALL, dtype=torch.float64)
    worst = 0.0
    for site in sites:
        x, y, g = want[site.module]
        for kind, rows in (("input_cov", x), ("output_cov", y), ("grad_cov", g)):
            assert got.count(site, kind.split("_")[0]) == len(rows)
            error = (got[kind, site] - second(rows)).norm() / second(rows).norm()
            worst = max(worst, float(error))
            centred = torch.cov(rows.T, correction=0)
            assert (got.centred(kind, site) - centred).norm() <= 1e-9 * second(rows).norm()
        torch.testing.assert_close(got["input_mean", site], x.mean(0))
        torch.testing.assert_close(got["output_mean", site.name], y.mean(0))
    assert worst < 1e-12
    pooled = [n for n in names if "pooler" in n]
    assert all(got.count(n) == 12 for n in pooled)  # one row a sentence: the mask has no say


def test_padding_changes_nothing():
    model, batches = zoo.bert(), zoo.token_batches()
    sites = find_sites(model, exclude="pooler")
    changed = [{**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], 7)} for b in batches]
    a, b = capture(model, sites, batches), capture(model, sites, changed)
    assert all(torch.equal(a["input_cov", s], b["input_cov", s]) for s in sites)
    unmasked = [{k: v for k, v in b.items() if k != "attention_mask"} for b in batches]
    assert capture(model, sites, unmasked).count(sites[0]) == 3 * 4 * 7


@pytest.mark.parametrize("bound", [6000, 9000, 20000])
def test_several_passes_equal_one(bound):
    model, batches, seen = zoo.bert(), zoo.token_batches(), []
    sites = find_sites(model)
    one = capture(model, sites, batches, kinds=ALL)
    many = capture(
        model, sites, batches, kinds=ALL, max_bytes=bound, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1] > len(batches)
    assert all(torch.equal(one[k, s], many[k, s]) for k in ALL for s in sites)
    with pytest.raises(OptionError, match=r"more than max_bytes=1,000"):
        capture(model, sites, batches, max_bytes=1000)


def test_the_bound_is_kept(monkeypatch):
    """What is allocated is counted: never more than the bound at once, finished passes included."""
    alive: list[weakref.ref[torch.Tensor]] = []
    peak = [0]

    class Counting(Moments):
        def __init__(self, *args):
            super().__init__(*args)
            alive.extend(weakref.ref(t) for t in (self.mean, self.scatter) if t is not None)
            peak[0] = max(peak[0], sum(ref().nbytes for ref in alive if ref() is not None))

    monkeypatch.setattr(sys.modules["deltaw.models.capture"], "Moments", Counting)
    model = zoo.bert()
    stats = capture(model, find_sites(model), zoo.token_batches(), kinds=ALL, max_bytes=9000)
    assert 0 < peak[0] <= 9000 < stats.nbytes
    assert not any(ref() is not None for ref in alive)  # what is left is mapped from a file


def test_q_k_v_share_one_covariance():
    model, batches = zoo.bert(layers=2), zoo.token_batches()
    stats = capture(model, find_sites(model, ["q", "k", "v"]), batches)
    layer = "bert.encoder.layer.1.attention.self."
    assert stats.shares_input(layer + "query", layer + "value")
    assert not stats.shares_input(layer + "query", "bert.encoder.layer.0.attention.self.query")
    assert stats.nbytes == 2 * 4 * (16 * 16 + 16)  # two inputs, not six
    assert torch.equal(stats["input_cov", layer + "query"], stats["input_cov", layer + "key"])


class Shifty(nn.Module):
    """Two layers that share their input only while `shared` is set."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.a(x) + self.b(x if self.calls < 3 else x + 1)


def test_a_shared_input_that_stops_being_shared():
    model, batches = Shifty(), [torch.randn(5, 4) for _ in range(4)]
    stats = capture(model, ["a", "b"], batches)
    assert not stats.shares_input("a", "b")
    torch.testing.assert_close(stats["input_cov", "b"], second(torch.cat(batches) + 1))
    torch.testing.assert_close(stats["input_cov", "a"], second(torch.cat(batches)))


def test_an_input_changed_in_place_is_not_the_same_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.add_(1))

    batches = [torch.randn(5, 4)]
    stats = capture(InPlace(), ["a", "b"], batches)
    torch.testing.assert_close(stats["input_cov", "b"], second(batches[0] + 1))


def test_a_module_used_twice_counts_both():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(6, 4)
    stats = capture(model, ["0"], [x])
    torch.testing.assert_close(stats["input_cov", "0"], second(torch.cat([x, torch.tanh(layer(x)).detach()])))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 5, 3, padding=1, stride=2),
        nn.Conv2d(3, 5, (2, 3), padding="same", dilation=(2, 1)),
        nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(3, 5, 4, stride=3),
        nn.Conv3d(3, 5, 2),
    ],
)
def test_convolution_rows_are_what_the_kernel_multiplies(conv):
    """With rows x and the flattened kernel W, E[W x xᵀ Wᵀ] is E[y yᵀ] of the bias-free output."""
    conv = conv.double()
    conv.bias = None
    spatial = len(conv.kernel_size)
    batches = [torch.randn(2, 3, *[7] * spatial, dtype=torch.float64) for _ in range(2)]
    stats = capture(nn.Sequential(conv), ["0"], batches, kinds=("input_cov", "output_cov"), dtype=torch.float64)
    w = conv.weight.detach().flatten(1)
    torch.testing.assert_close(w @ stats["input_cov", "0"] @ w.T, stats["output_cov", "0"])
    assert stats.count("0", "input") == stats.count("0", "output")


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    offset=st.sampled_from([0.0, 1e2, 1e3]),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
)
def test_centring_does_not_cancel(seed, offset, sizes):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(t, 3, generator=generator) + offset for t in [*sizes, 40]]
    moments = Moments(3, True, torch.float32)
    for part in parts:
        assert moments.add(part)
    rows = torch.cat(parts).double()
    want = torch.cov(rows.T, correction=0)
    got = moments.scatter.double() / moments.count
    assert moments.count == len(rows)
    assert (got - want).norm() <= 1e-3 * want.norm()
    torch.testing.assert_close(moments.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-5)


def test_the_textbook_formula_would_cancel():
    """A planted bug: E[xxᵀ] − μμᵀ in float32 fails the very bound that the update above meets."""
    rows = torch.randn(4000, 3) + 1e3
    want = torch.cov(rows.double().T, correction=0)
    naive = (rows.T @ rows / len(rows) - torch.outer(rows.mean(0), rows.mean(0))).double()
    assert (naive - want).norm() > 1e-3 * want.norm()
    moments = Moments(3, True, torch.float32)
    moments.add(rows)
    assert (moments.scatter.double() / moments.count - want).norm() < 1e-3 * want.norm()


def test_gradients_when_everything_is_frozen_and_nothing_is_left_behind():
    model, batches = zoo.bert().double(), zoo.token_batches()
    sites = find_sites(model)
    want = capture(model, sites, batches, kinds=("grad_cov",), dtype=torch.float64)
    model.requires_grad_(False)
    model.classifier.weight.requires_grad_(True)
    model.train()
    got = capture(model, sites, batches, kinds=("grad_cov",), dtype=torch.float64)
    assert all(torch.equal(want["grad_cov", s], got["grad_cov", s]) for s in sites)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["classifier.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_of_ones_own():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4)
    stats = capture(model, ["0"], [x], kinds=("grad_cov",), forward=lambda m, b: m(b).sum())
    torch.testing.assert_close(stats["grad_cov", "0"], torch.ones(3, 3))  # g = 1 for the sum of outputs
    mean = capture(model, ["0"], [x], kinds=("grad_cov",), forward=lambda m, b: m(b).mean(1).mean())
    torch.testing.assert_close(mean["grad_cov", "0"], torch.full((3, 3), 1 / 18**2))


def test_bfloat16_model_accumulates_in_float32():
    model = nn.Sequential(nn.Linear(8, 4)).bfloat16()
    batches = [torch.randn(64, 8).bfloat16() for _ in range(20)]
    got = capture(model, ["0"], batches)["input_cov", "0"]
    want = second(torch.cat(batches).double())
    assert got.dtype == torch.float32
    assert (got.double() - want).norm() < 1e-5 * want.norm()


def test_save_and_load_are_bit_exact(tmp_path):
    model = zoo.bert()
    sites = find_sites(model)
    stats = capture(model, sites, zoo.token_batches(), kinds=("input_cov", "output_mean"))
    stats.save(tmp_path / "sub" / "s.safetensors")
    again = Statistics.load(tmp_path / "sub" / "s.safetensors")
    for s in sites:
        assert torch.equal(stats["input_cov", s], again["input_cov", s])
        assert torch.equal(stats["output_mean", s], again["output_mean", s])
        assert stats.count(s) == again.count(s)
    assert again.modules == stats.modules
    assert again.nbytes == stats.nbytes
    assert ("output_cov", sites[0]) not in again
    assert ("output_mean", sites[0]) in again
    torch.save({}, tmp_path / "s.pt")
    with pytest.raises(CheckpointError, match="refused"):
        Statistics.load(tmp_path / "s.pt")


def test_bad_input():
    model, batches = zoo.bert(), zoo.token_batches()
    query = "bert.encoder.layer.0.attention.self.query"
    with pytest.raises(UnknownNameError, match="did you mean 'input_cov'"):
        capture(model, [query], batches, kinds=("imput_cov",))
    with pytest.raises(UnknownNameError, match="module"):
        capture(model, [query + "x"], batches)
    with pytest.raises(TargetError, match="is a LayerNorm"):
        capture(model, ["bert.embeddings.LayerNorm"], batches)
    with pytest.raises(TargetError, match="grouped or transposed"):
        capture(zoo.ConvNet(), ["grouped"], [torch.zeros(1, 3, 8, 8)])
    with pytest.raises(TargetError, match="no sites"):
        capture(model, [], batches)
    with pytest.raises(DataError, match="no batches"):
        capture(model, [query], [])
    with pytest.raises(DataError, match="no loss"):
        capture(model, [query], [{k: v for k, v in batches[0].items() if k != "labels"}], kinds=("grad_cov",))
    with pytest.raises(DataError, match=r"expected \[batch, tokens\]"):
        capture(model, [query], [{**batches[0], "attention_mask": torch.ones(4, 1, 7, 7)}])
    with pytest.raises(OptionError, match="float32 or"):
        capture(model, [query], batches, dtype=torch.bfloat16)
    stats = capture(model, [query], batches)
    with pytest.raises(DataError, match="'output_cov',"):
        stats["output_cov", query]
    with pytest.raises(UnknownNameError, match="captured module"):
        stats["input_cov", "nothing"]
    unused = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    lonely = capture(unused, ["a", "b"], [torch.zeros(2, 4)], forward=lambda m, b: m["a"](b))
    with pytest.raises(DataError, match="'b' saw no token"):
        lonely["input_cov", "b"]


def test_non_finite_numbers_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    bad = torch.zeros(3, 4)
    bad[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="input of module '0' is not finite in batch 1"):
        capture(model, ["0", "1"], [torch.zeros(3, 4), bad])
    with pytest.raises(NonFiniteError, match="overflows"):
        capture(model, ["0"], [torch.tensor([[1e25, 0, 0, 0], [-1e25, 0, 0, 0]])])
    assert not model[0]._forward_pre_hooks
