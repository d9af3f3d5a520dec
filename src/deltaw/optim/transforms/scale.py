"""Scales: by the shape of a matrix, or to a given root mean square."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.optim import checks
from deltaw.optim.context import Context
from deltaw.optim.transform import Stacked, Transform

#: rule -> (factor of (m, n), the formula)
SCALE_RULES: dict[str, tuple[Callable[[int, int], float], str]] = {
    "original": (lambda m, n: math.sqrt(max(1.0, m / n)), "sqrt(max(1, m/n))"),
    "match_rms_adamw": (lambda m, n: 0.2 * math.sqrt(max(m, n)), "0.2*sqrt(max(m, n))"),
    "spectral": (lambda m, n: math.sqrt(m / n), "sqrt(m/n)"),
    "none": (lambda m, n: 1.0, ""),
}


@dataclass(frozen=True)
class ShapeScale(Transform):
    """U ← c(m, n)·U. Rules, for an update with singular values one:

    `original` √max(1, m/n) (Jordan); `match_rms_adamw` 0.2·√max(m, n), the usual RMS of AdamW's updates, so that
    its learning rates carry over (arXiv:2502.16982); `spectral` √(m/n), the RMS→RMS operator norm, which
    transfers across widths; `none` 1. m and n are those of each block of a fused matrix.
    """

    scale: str = "original"
    sharding = "rows"

    def __post_init__(self) -> None:
        checks.choice("scale", self.scale, SCALE_RULES)

    def update(self, u: Tensor, state: Stacked, ctx: Context) -> Tensor:
        return u * self._factor(ctx)

    def write(self, weights: Sequence[Tensor], u: Tensor, state: Stacked, ctx: Context) -> None:
        ctx.descend(weights, ctx.rows(u), [self._factor(ctx)] * len(weights))

    def _factor(self, ctx: Context) -> float:
        m, n = ctx.shape  # type: ignore[misc]
        return SCALE_RULES[self.scale][0](m, n)

    def scale_note(self, shape: tuple[int, int]) -> str:
        factor, formula = SCALE_RULES[self.scale]
        return f"{factor(*shape):.4g} = {formula}" if formula else ""


@dataclass(frozen=True)
class MatchRMS(Transform):
    """U ← U · rms·√(mn)/‖U‖: every update has this root mean square. Zero stays zero."""

    rms: float = 0.2
    sharding = "rows"

    def __post_init__(self) -> None:
        checks.number("rms", self.rms)

    def update(self, u: Tensor, state: Stacked, ctx: Context) -> Tensor:
        return u * self._gain(u, ctx)

    def write(self, weights: Sequence[Tensor], u: Tensor, state: Stacked, ctx: Context) -> None:
        ctx.descend(weights, ctx.rows(u), ctx.rows(self._gain(u, ctx).to(weights[0].dtype)))

    def _gain(self, u: Tensor, ctx: Context) -> Tensor:
        m, n = ctx.shape  # type: ignore[misc]
        wide = torch.promote_types(u.dtype, torch.float32)
        squares = ctx.total(torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True, dtype=wide).square())
        norm = squares.sqrt()
        return torch.where(norm > 0, self.rms * math.sqrt(m * n) / norm, 0.0)

    def scale_note(self, shape: tuple[int, int]) -> str:
        return f"RMS {self.rms:g}"


scale_by_shape: Any = ShapeScale
match_rms: Any = MatchRMS
