"""Intervals for accuracies and for paired differences between methods scored on the same test examples.

The paired bootstrap draws n examples with replacement and recomputes the difference. For n examples whose
differences d_i take k distinct values v_j with counts c_j, the resampled mean is sum_j v_j M_j / n with
M ~ Multinomial(n, c / n): the same law as drawing indices, at a cost that does not grow with n.

Sources: Efron and Tibshirani, *An Introduction to the Bootstrap* (1993), chapters 13 and 16 (percentile interval);
Wilson, *JASA* 22 (1927), equation for the score interval of a proportion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deltaw.errors import DataError, NonFiniteError

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval; both ends are None where no interval is known."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        return self.low is not None and self.high is not None

    @property
    def contains_zero(self) -> bool:
        """Whether 0 lies in the interval (the value itself where there is none)."""
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        return low <= 0.0 <= high

    def scaled(self, factor: float) -> Interval:
        ends = (None if x is None else x * factor for x in (self.low, self.high))
        return Interval(self.value * factor, *ends)


def _vector(x: ArrayLike, name: str) -> NDArray[np.float64]:
    v = np.asarray(x, dtype=np.float64)
    if v.ndim != 1 or v.size == 0:
        raise DataError(f"{name}: found shape {v.shape}, expected one score per test example; pass a flat list")
    if not np.isfinite(v).all():
        raise NonFiniteError(f"{name}: {int((~np.isfinite(v)).sum())} of {v.size} scores are not finite")
    return v


def wilson(successes: float, n: int, level: float = LEVEL) -> Interval:
    """Wilson score interval of the proportion successes / n (n >= 1)."""
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"a proportion of {successes} in {n} does not exist; pass 0 <= successes <= n and n >= 1")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def accuracy_interval(correct: ArrayLike, level: float = LEVEL) -> Interval:
    """Accuracy of 0/1 scores [n] with its Wilson interval."""
    v = _vector(correct, "correct")
    return wilson(float(v.sum()), v.size, level)


def bootstrap_means(
    domains: Sequence[ArrayLike], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, NDArray[np.float64]]:
    """The mean over domains of the mean score, and its bootstrap distribution [resamples].

    domains: one vector of scores each, resampled within the domain; every domain weighs the same.
    """
    if not domains:
        raise DataError("no domain to resample; pass at least one vector of scores")
    rng = np.random.default_rng(seed)
    total, draws = 0.0, np.zeros(resamples)
    for number, scores in enumerate(domains):
        v = _vector(scores, f"domain {number}")
        values, counts = np.unique(v, return_counts=True)
        draws += rng.multinomial(v.size, counts / v.size, size=resamples) @ values / v.size
        total += float(v.mean())
    return total / len(domains), draws / len(domains)


def bootstrap_mean(
    domains: Sequence[ArrayLike], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Mean over domains of the mean score, with the percentile interval of `bootstrap_means`."""
    value, draws = bootstrap_means(domains, resamples=resamples, seed=seed)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Mean of a - b over the examples [n] both were scored on, with its bootstrap interval."""
    return paired_bootstrap_mean([(a, b)], resamples=resamples, level=level, seed=seed)


def paired_bootstrap_mean(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Mean over domains of (mean of a - b), examples resampled within each domain.

    pairs: one (a, b) per domain, score i of both belonging to test example i. Raises DataError where the
    two lengths differ.
    """
    differences = []
    for number, (a, b) in enumerate(pairs):
        va, vb = _vector(a, f"first of pair {number}"), _vector(b, f"second of pair {number}")
        if va.size != vb.size:
            raise DataError(
                f"pair {number}: {va.size} and {vb.size} scores; a paired comparison needs both methods "
                "scored on the same test examples in the same order"
            )
        differences.append(va - vb)
    return bootstrap_mean(differences, resamples=resamples, level=level, seed=seed)
