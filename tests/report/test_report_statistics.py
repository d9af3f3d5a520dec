"""Intervals against closed forms, exact distributions and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import DataError, NonFiniteError
from deltaw.report import accuracy_interval, bootstrap_mean, paired_bootstrap, paired_bootstrap_mean, wilson
from deltaw.report.statistics import bootstrap_means

Z = 1.959963984540054


def _pair(rng: np.random.Generator, n: int, p: float = 0.8, lift: float = 0.03) -> tuple[np.ndarray, np.ndarray]:
    ease = rng.normal(size=n)
    noisy = [ease + 0.5 * rng.normal(size=n) for _ in range(2)]
    cut = math.sqrt(1.25)
    quantile = {q: cut * _normal_quantile(q) for q in (p, p + lift)}
    return (noisy[0] < quantile[p + lift]).astype(int), (noisy[1] < quantile[p]).astype(int)


def _normal_quantile(q: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(q)


def test_bootstrap_variance_is_the_paired_one():
    """Var* of the mean difference = (b + c) / n² − (b − c)² / n³ with the discordant counts b, c of McNemar."""
    a, b = _pair(np.random.default_rng(1), 600)
    won, lost, n = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum()), a.size
    exact = (won + lost) / n**2 - (won - lost) ** 2 / n**3
    _, draws = bootstrap_means([a - b], resamples=40_000, seed=3)
    assert draws.var() == pytest.approx(exact, rel=0.03)
    assert draws.mean() == pytest.approx((won - lost) / n, abs=4 * math.sqrt(exact / 40_000))


def test_interval_approaches_the_normal_one():
    a, b = _pair(np.random.default_rng(2), 20_000)
    found = paired_bootstrap(a, b, seed=5)
    half = Z * (a - b).std() / math.sqrt(a.size)
    assert found.low == pytest.approx(found.value - half, abs=0.05 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.05 * half)


def test_multinomial_draw_equals_drawing_indices():
    """The law of the resampled mean is that of drawing n indices with replacement (compared at nine quantiles)."""
    rng = np.random.default_rng(4)
    d = rng.integers(-1, 2, size=80)
    plain = d[rng.integers(0, 80, size=(20_000, 80))].mean(1)
    _, draws = bootstrap_means([d], resamples=20_000, seed=6)
    q = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(draws, q), np.quantile(plain, q), atol=1.01 / 80)


def test_mean_over_domains_weighs_domains_alike_and_pools_variance():
    rng = np.random.default_rng(7)
    pairs = [_pair(rng, n) for n in (200, 800, 3200)]
    found = paired_bootstrap_mean(pairs, seed=8)
    assert found.value == pytest.approx(np.mean([(a - b).mean() for a, b in pairs]))
    half = Z * math.sqrt(sum((a - b).var() / a.size for a, b in pairs)) / 3
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_coverage_is_near_the_nominal_level():
    rng, lift, hits = np.random.default_rng(9), 0.04, 0
    for trial in range(300):
        a, b = _pair(rng, 250, lift=lift)
        i = paired_bootstrap(a, b, resamples=1000, seed=trial)
        hits += i.low <= lift <= i.high
    assert 0.91 <= hits / 300 <= 0.985  # 0.95 within three standard errors of 300 trials


def test_wilson_against_its_defining_equation():
    """The ends p solve (p̂ − p)² = z² p (1 − p) / n."""
    for k, n in ((0, 10), (3, 10), (540, 600), (600, 600)):
        i = wilson(k, n)
        for p in (i.low, i.high):
            assert (k / n - p) ** 2 == pytest.approx(Z**2 * p * (1 - p) / n, abs=1e-12)
    assert accuracy_interval([1, 1, 0, 1]).value == 0.75


def test_plain_interval_of_the_mean_agrees_with_wilson_on_one_domain():
    scores = (np.arange(600) < 500).astype(int)
    a, b = bootstrap_mean([scores], seed=1), accuracy_interval(scores)
    assert a.low == pytest.approx(b.low, abs=0.004)
    assert a.high == pytest.approx(b.high, abs=0.004)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_symmetry_containment_and_determinism(pairs, seed):
    a, b = np.array(pairs, dtype=int).T
    i, again = (paired_bootstrap(a, b, resamples=400, seed=seed) for _ in range(2))
    assert i == again
    assert -1 <= i.low <= i.high <= 1
    swapped = paired_bootstrap(b, a, resamples=400, seed=seed)
    assert swapped.value == pytest.approx(-i.value)
    same = paired_bootstrap(a, a, resamples=50, seed=seed)
    assert (same.low, same.value, same.high) == (0, 0, 0)
    assert same.contains_zero


def test_bad_scores_are_named():
    with pytest.raises(DataError, match="same test examples"):
        paired_bootstrap([1, 0], [1, 0, 1])
    with pytest.raises(NonFiniteError, match="1 of 2"):
        accuracy_interval([1, float("nan")])
    with pytest.raises(DataError, match="flat list"):
        bootstrap_mean([[]])
    with pytest.raises(DataError, match="3 in 2"):
        wilson(3, 2)
