"""What every compression method must satisfy, and one planted bug per invariant that must be caught.

Registering a method in the family "compress" puts it under these checks. The checks only use the contract of
`Compressor`: what it says about its own error, cost and statistics must be true of the layer it returns.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltaw import catalogue
from deltaw.compress import Compressor, Decomposition, Factors, Layer, compress
from deltaw.compress.base import output_error
from deltaw.models import capture, find_sites

CARDS = [c for c in catalogue.cards("compress") if isinstance(c.target, type) and issubclass(c.target, Compressor)]
SHAPES = [(6, 9, True), (9, 6, False), (7, 7, True)]
KINDS = ("input_cov", "input_mean", "output_cov", "output_mean", "grad_cov")


def make_layer(m: int, n: int, bias: bool, tokens: int = 40) -> tuple[Layer, torch.Tensor]:
    """A layer with correlated inputs of non-zero mean, and those inputs [t, n]."""
    g = torch.Generator().manual_seed(m * 100 + n)
    model = nn.Sequential(nn.Linear(n, m, bias=bias, dtype=torch.float64))
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    mix = torch.randn(n, n, generator=g, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=g, dtype=torch.float64) @ mix + 1.5
    site = find_sites(model, "0")[0]
    target = torch.randn(tokens, m, generator=g, dtype=torch.float64)
    stats = capture(
        model, [site], [x], KINDS, forward=lambda net, batch: (net(batch) - target).square().mean(), dtype=torch.float64
    )
    return Layer.of(model, site, stats), x


def at_rank(method: Compressor, layer: Layer, rank: int) -> Factors:
    return method.factors(layer, method.decompose(layer), rank)


def check_shapes_and_cost(method: Compressor) -> None:
    for m, n, bias in SHAPES:
        layer, _ = make_layer(m, n, bias)
        for rank in (1, 3, min(m, n)):
            f = at_rank(method, layer, rank)
            assert f.left.shape == (m, rank)
            assert f.right.shape == (rank, n)
            assert f.left.dtype == f.right.dtype == torch.float64
            added = f.bias.numel() if f.bias is not None and layer.bias is None else 0
            assert f.left.numel() + f.right.numel() + added == method.cost(layer.site, rank, layer.bias is not None)
            assert layer.bias is None or f.bias is not None, "the layer's bias is lost"
            if rank < min(m, n):
                formula = method.card.evaluate("params", m=m, n=n, r=rank)
                assert formula == f.left.numel() + f.right.numel()


def check_error_is_true_to_its_spectrum(method: Compressor) -> None:
    """The promised squared errors fall with the rank, end at zero, and the full rank gives the layer back."""
    for m, n, bias in SHAPES:
        layer, x = make_layer(m, n, bias)
        d = method.decompose(layer)
        squares = d.squared_errors()
        assert squares.shape == (min(m, n) + 1,)
        assert bool((squares[1:] <= squares[:-1] + 1e-12).all())
        assert float(squares[-1]) == 0
        y = layer.weight @ x.mT + (0 if layer.bias is None else layer.bias[:, None])
        reached = []
        for rank in range(1, min(m, n) + 1):
            f = method.factors(layer, d, rank)
            found = f.dense() @ x.mT + (0 if f.bias is None else f.bias[:, None])
            reached.append(float((found - y).square().sum() / y.square().sum()) ** 0.5)
            assert reached[-1] == pytest.approx(output_error(layer, f), rel=1e-6, abs=1e-6)
        assert reached[-1] < 1e-6, "full rank must reproduce the calibration outputs"
        assert reached[-1] < reached[0]


def check_first_rank_beats_the_others(method: Compressor) -> None:
    """Directions come in the order of what dropping them costs: in its own norm no single direction is better."""
    for m, n, bias in SHAPES:
        layer, _ = make_layer(m, n, bias)
        d = method.decompose(layer)
        s = d.singular_values
        assert bool((s[:-1] >= s[1:] - 1e-9 * s[0]).all())
        assert float(s.min()) >= 0


def check_uses_declared_statistics_only(method: Compressor) -> None:
    layer, _ = make_layer(6, 9, True)
    expected = at_rank(method, layer, 3)

    class Watch:
        def __getitem__(self, key):
            assert key[0] in method.needs, f"{key[0]} is read but not declared in `needs`"
            return layer.stats[key]

        def centred(self, kind, where):
            assert kind in method.needs, f"{kind} is read but not declared in `needs`"
            return layer.stats.centred(kind, where)

        def __contains__(self, key):
            return key in layer.stats

    watched = Layer(layer.site, layer.weight, layer.bias, Watch())
    again = at_rank(method, watched, 3)
    assert torch.equal(expected.left, again.left)  # and equal input gives equal output
    assert torch.equal(expected.right, again.right)


def check_leaves_its_input_alone(method: Compressor) -> None:
    layer, _ = make_layer(6, 9, True)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    before = [layer.stats[k, layer.site] for k in ("input_cov", "output_cov")]
    at_rank(method, layer, 2)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)
    after = [layer.stats[k, layer.site] for k in ("input_cov", "output_cov")]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def check_survives_poor_statistics(method: Compressor) -> None:
    """Fewer tokens than features, and a weight of zeros: finite factors."""
    layer, _ = make_layer(9, 6, True, tokens=2)
    f = at_rank(method, layer, 5)
    assert all(bool(torch.isfinite(t).all()) for t in (f.left, f.right, f.bias))
    zero = Layer(layer.site, torch.zeros_like(layer.weight), layer.bias, layer.stats)
    f = at_rank(method, zero, 2)
    assert all(bool(torch.isfinite(t).all()) for t in (f.left, f.right, f.bias))


def check_model_keeps_the_budget(method: Compressor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12, bias=False), nn.Linear(12, 12))
    x = torch.randn(64, 12)
    for ratio in (0.45, 0.6, 0.9):
        for allocation in ("uniform", "energy", "loss"):
            small = copy.deepcopy(model)
            report = compress(small, method, ratio, [x], allocation=allocation)
            total = sum(p.numel() for p in model.parameters())
            saved = total - sum(p.numel() for p in small.parameters())
            assert saved >= report.params_before - int(ratio * report.params_before), "the budget is exceeded"
            assert saved == report.params_before - report.params_after
            assert small(x).shape == model(x).shape


CHECKS = [v for k, v in list(globals().items()) if k.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.id)
def test_invariants(card, check):
    check(card.target())


def test_every_family_card_is_covered():
    assert {"svd", "svd-llm", "lord"} <= {c.id for c in CARDS}
    assert all(c.summary and c.paper and "params" in c.cost for c in CARDS)


# -- planted bugs: each must be caught by the check beside it ---------------------------------------------------

SVD = catalogue.get("svd", "compress").target
LORD = catalogue.get("lord", "compress").target


class LosesBias(SVD):
    def factors(self, layer, decomposition, rank):
        f = super().factors(layer, decomposition, rank)
        return Factors(f.left, f.right, None)


class HidesItsBias(LORD):
    def __init__(self):
        super().__init__()
        self.adds_bias = False


class UnsortedSpectrum(SVD):
    def decompose(self, layer):
        d = super().decompose(layer)
        return Decomposition(d.left.flip(1), d.right.flip(0), d.singular_values.flip(0))


class WrongMean(LORD):
    def factors(self, layer, decomposition, rank):
        f = super().factors(layer, decomposition, rank)
        return Factors(f.left, f.right, layer.stat("output_mean"))


class ReadsUndeclared(SVD):
    def decompose(self, layer):
        layer.stat("grad_cov")
        return super().decompose(layer)


class WritesIntoTheWeight(SVD):
    def decompose(self, layer):
        layer.weight.mul_(2)
        return super().decompose(layer)


class DividesByTheSpectrum(SVD):
    def decompose(self, layer):
        d = super().decompose(layer)
        top = d.singular_values[0]
        return Decomposition(d.left / top, d.right * top, d.singular_values)


class OverdrawsTheBudget(SVD):
    def cost(self, site, rank, has_bias):
        return rank * max(site.matrix_shape)


@pytest.mark.parametrize(
    ("bug", "check"),
    [
        (LosesBias, check_shapes_and_cost),
        (HidesItsBias, check_shapes_and_cost),
        (UnsortedSpectrum, check_first_rank_beats_the_others),
        (WrongMean, check_error_is_true_to_its_spectrum),
        (ReadsUndeclared, check_uses_declared_statistics_only),
        (WritesIntoTheWeight, check_leaves_its_input_alone),
        (DividesByTheSpectrum, check_survives_poor_statistics),
        (OverdrawsTheBudget, check_model_keeps_the_budget),
    ],
    ids=lambda v: v.__name__.removeprefix("check_"),
)
def test_planted_bugs_are_caught(bug, check):
    with pytest.raises(AssertionError):
        check(bug())
