"""The two loops behind `orthogonalize`: on the matrix itself, and on its smaller Gram matrix.

Input is [B, s, l] with s <= l. Both start from X / ‖X‖_F, with the norm taken in float32 or wider before the
cast: half precision overflows on the square of ordinary gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.errors import OptionError
from deltaw.linalg._checks import working_dtype
from deltaw.linalg.coefficients import Triple

_HALF = (torch.bfloat16, torch.float16)


def unit_scale(x: Tensor) -> Tensor:
    """1/‖X‖_F per matrix, [..., 1, 1], safe for tiny and huge entries.

    A zero matrix gets 1 (it stays zero); one with NaN or infinity gets NaN, so that all of it becomes NaN. `x` must
    be float32 or float64.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    tiny, huge = (1e-16, 1e16) if x.dtype == torch.float32 else (1e-120, 1e120)
    safe = (norm > tiny) & (norm < huge)
    if x.device.type == "cpu" and bool(safe.all()):  # the common case: one pass over the data
        return norm.reciprocal()
    # squares under- or overflowed somewhere: divide by the largest entry first
    peak = x.abs().amax(dim=(-2, -1), keepdim=True)
    divisor = torch.where(peak > 0, peak, 1.0)
    norm = torch.linalg.vector_norm(x / divisor, dim=(-2, -1), keepdim=True)
    norm = torch.where(peak > 0, norm, 1.0)
    scale = (1.0 / norm) / divisor
    return torch.where(torch.isfinite(peak), scale, float("nan"))


def normalised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X / ‖X‖_F in `dtype`; a subnormal 1/‖X‖ is avoided by scaling in two strokes when needed."""
    wide = x.to(working_dtype(x.dtype))
    return (wide * unit_scale(wide)).to(dtype)


def iterate(x: Tensor, coefficients: Sequence[Triple], dtype: torch.dtype) -> Tensor:
    """X ← aX + (bA + cA²)X with A = XXᵀ, on [B, s, l]: 4s²l + 2s³ flops a step."""
    x = normalised(x, dtype)
    for a, b, c in coefficients:
        gram = x @ x.mT
        mixed = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, mixed, x, beta=a)
    return x


def gram_iterate(x: Tensor, coefficients: Sequence[Triple], restarts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The same polynomial through R = XXᵀ only; X is touched at the start, at `restarts` and at the end.

    Between restarts the factor Q with X_now = Q X is kept as a polynomial of R, so all products are s×s. All these
    matrices commute and are symmetric. Source: Gram Newton–Schulz (Zhang, Amsel, Chen, Dao, 2026).
    """
    cuts = sorted(set(restarts))
    if cuts and not (cuts[0] > 0 and cuts[-1] < len(coefficients)):
        raise OptionError(f"restarts={list(restarts)}; expected steps between 1 and {len(coefficients) - 1}")
    x = normalised(x, dtype)
    for begin, end in zip([0, *cuts], [*cuts, len(coefficients)], strict=True):
        r = x @ x.mT
        q: Tensor | None = None
        first = coefficients[begin][0]
        for step in range(begin, end):
            a, b, c = coefficients[step]
            z = torch.baddbmm(r, r, r, beta=b, alpha=c)
            # Q starts as I, so the first product is Z + aI; its aI goes into `first` until a second step needs it
            if q is None:
                q = z
            else:
                if step == begin + 1:
                    q = q + first * torch.eye(q.shape[-1], dtype=dtype, device=q.device)
                q = torch.baddbmm(q, q, z, beta=a)
            if step < end - 1:
                rz = torch.baddbmm(r, r, z, beta=a)
                r = torch.baddbmm(rz, rz, z, beta=a)
        assert q is not None
        x = torch.baddbmm(x, q, x, beta=first) if end - begin == 1 else q @ x
    return x


@functools.lru_cache(maxsize=64)
def plan_restarts(steps: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Where the Gram iteration forms X anew, 0-based.

    Rounding leaves R slightly indefinite; the steep early steps amplify a negative eigenvalue at every step until the
    next restart. Measured (128×512, decaying spectra): half precision survives two steps between restarts, not
    three; float32 and float64 are at their accuracy with a single restart after step 2, and one more every four.
    """
    if dtype in _HALF:
        return tuple(range(2, steps, 2))
    return tuple(range(2, steps, 3))


def prefers_gram(s: int, l: int, steps: int) -> bool:
    """Whether the Gram iteration needs fewer multiplications than the plain loop with restarts every 2 steps."""
    plain = steps * (4 * s * s * l + 2 * s**3)
    segments = (steps + 1) // 2
    gram = segments * 4 * s * s * l + (5 * (steps // 2) + (steps % 2)) * 2 * s**3
    return gram < 0.95 * plain
