"""Coefficients (a, b, c) of the quintic steps σ ↦ aσ + bσ³ + cσ⁵ that drive singular values to one.

Polar Express (Amsel, Persson, Musco, Gower, arXiv:2505.16932) composes, greedily, the odd quintic that is the
best uniform approximation of 1 on the interval the previous step left; by its Theorem 3.1 that greedy choice is
the optimal composition. Sets circulate under one name in several variants, so each is spelled out here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from deltaw.errors import OptionError, unknown_name

Triple = tuple[float, float, float]

#: the fixed point of all sets: the Padé-like quintic with p(1) = 1, p'(1) = p''(1) = 0
NEWTON_SCHULZ_QUINTIC: Triple = (1.875, -1.25, 0.375)

#: published sets, verbatim. A list shorter than the number of steps goes on with its continuation.
COEFFICIENT_SETS: dict[str, tuple[Triple, ...]] = {
    # K. Jordan's Muon: one triple, repeated; spreads σ over 0.68 … 1.13 on purpose
    "jordan": ((3.4445, -4.7750, 2.0315),),
    # J. You's five-step list: tight (±3 %) for σ >= 1e-2 of the Frobenius norm, weak below
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # arXiv:2505.16932, raw (no safety factor): lower bound 1e-3
    "polar-express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    ),
}
#: sets whose last triple repeats for ever; the others continue with NEWTON_SCHULZ_QUINTIC
_REPEATS = {"jordan"}

#: the set "fast" behind `method="auto"` in half precision: ±4.8 % for σ >= 1.5e-3, where `jordan` spreads ±20 %, and above
#: it at every σ below
FAST_LOWER, FAST_STEPS = 1.5e-3, 5


def evaluate(coefficients: Sequence[Triple], sigma: np.ndarray) -> np.ndarray:
    """The composed polynomial at float64 points `sigma`: what the exact iteration makes of singular values."""
    sigma = np.asarray(sigma, dtype=np.float64)
    for a, b, c in coefficients:
        s2 = sigma * sigma
        sigma = sigma * (a + s2 * (b + s2 * c))
    return sigma


def optimal_quintic(lower: float, upper: float) -> tuple[Triple, float]:
    """The odd quintic p minimising max |1 − p(σ)| on [lower, upper], and that maximum, in float64.

    Remez exchange: p equioscillates at lower, its two interior extrema and upper (three free coefficients, so
    four alternation points). The interior points start evenly spaced and move to the roots of p' until the
    levelled error settles.
    """
    if not 0 < lower <= upper:
        raise OptionError(f"bounds [{lower}, {upper}]; expected 0 < lower <= upper")
    if lower / upper > 1 - 5e-6:  # the exchange is singular on a point: take the Taylor form, exact to rounding
        a, b, c = NEWTON_SCHULZ_QUINTIC
        mid = (lower + upper) / 2
        return (a / mid, b / mid**3, c / mid**5), 0.0
    # work on [lower/upper, 1]: the system is best scaled there
    ratio = lower / upper
    inner = np.array([(3 * ratio + 1) / 4, (ratio + 3) / 4])
    error, previous = math.inf, -math.inf
    a = b = c = 0.0
    for _ in range(200):
        if abs(error - previous) <= 1e-15:
            break
        previous = error
        points = np.array([ratio, *inner, 1.0])
        system = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = (float(v) for v in np.linalg.solve(system, np.ones(4)))
        spread = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        inner = np.sqrt(np.array([(-3 * b - spread) / (10 * c), (-3 * b + spread) / (10 * c)]))
    return (a / upper, b / upper**3, c / upper**5), abs(error)


@functools.lru_cache(maxsize=64)
def polar_express_coefficients(
    lower: float = 1e-3, steps: int = 5, cushion: float = 0.0, safety: float = 1.0
) -> tuple[Triple, ...]:
    """The optimal composition of `steps` quintics for singular values in [lower, 1], in float64.

    Args:
        lower: smallest singular value, relative to the normalisation, that must come out near one.
        steps: number of quintics.
        cushion: solve no step for a lower end below `cushion` times its upper end, and recentre it afterwards.
            0 gives the pure optimum, whose first steps fall steeply between their extrema; the paper takes
            0.02407327424182761, which trades a little accuracy for smoother early steps.
        safety: t >= 1 replaces (a, b, c) by (a/t, b/t³, c/t⁵) in all but the last step, so that singular values
            rounded upwards in half precision stay inside the interval (paper, Algorithm 1: 1.01).

    Returns:
        `steps` triples. Source: arXiv:2505.16932, Theorem 3.1 and Section 3.4.
    """
    if not 0 < lower <= 1:
        raise OptionError(f"lower={lower}; expected 0 < lower <= 1, relative to the Frobenius norm")
    if steps < 1:
        raise OptionError(f"steps={steps}; expected at least 1")
    if not 0 <= cushion < 1 or safety < 1:
        raise OptionError(f"cushion={cushion}, safety={safety}; expected 0 <= cushion < 1 and safety >= 1")
    low, high = float(lower), 1.0
    found: list[Triple] = []
    for step in range(steps):
        solved_low = max(low, cushion * high)
        (a, b, c), _ = optimal_quintic(solved_low, high)
        if solved_low > low:
            # the true interval reaches below the one solved for: recentre its image around one
            ends = evaluate([(a, b, c)], np.array([low, high]))
            scale = 2.0 / float(ends.sum())
            a, b, c = a * scale, b * scale, c * scale
        if step < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        found.append((a, b, c))
        low = float(evaluate([(a, b, c)], np.array([low]))[0])
        high = 2.0 - low
    return tuple(found)


def resolve_coefficients(
    coefficients: str | Sequence[Triple] | None, steps: int | None, default: str, *, safety: float = 1.0
) -> tuple[Triple, ...]:
    """Turn a set's name, an explicit list or None into exactly `steps` triples.

    Explicit lists are taken verbatim (`steps` may shorten them, not lengthen them). Named sets get the safety
    factor in all but the last step.
    """
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise OptionError(f"steps={steps!r}; expected a whole number of at least 1")
    if coefficients is None:
        coefficients = default
    if not isinstance(coefficients, str):
        triples = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
        count = len(triples) if steps is None else steps
        if not triples or count > len(triples):
            raise OptionError(f"steps={steps} with {len(triples)} coefficient triples; give one triple a step")
        return triples[:count]
    if coefficients == "fast":
        return polar_express_coefficients(FAST_LOWER, steps or FAST_STEPS, safety=safety)
    if coefficients not in COEFFICIENT_SETS:
        raise unknown_name("coefficient set", coefficients, [*COEFFICIENT_SETS, "fast"])
    listed = COEFFICIENT_SETS[coefficients]
    count = steps or 5
    tail = listed[-1] if coefficients in _REPEATS else NEWTON_SCHULZ_QUINTIC
    triples = (listed + (tail,) * count)[:count]
    t = safety if coefficients == "polar-express" else 1.0
    return tuple((a / t, b / t**3, c / t**5) for a, b, c in triples[:-1]) + triples[-1:]
