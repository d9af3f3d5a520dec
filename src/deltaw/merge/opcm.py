"""Orthogonal projection-based continual merging: one model after the other, at constant length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaw.catalogue import method
from deltaw.merge.base import MatrixMethod, Scan, TensorContext, check_number, deltas, weighted_sum
from deltaw.merge.spectral import triplets
from deltaw.merge.spill import Spill

if TYPE_CHECKING:
    from deltaw.merge.plan import Row


@method(
    "opcm",
    family="merge",
    paper="arXiv:2501.09522",
    title="Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging",
    summary="add models one by one, each without its part in the directions of the merge so far",
    tags={"spectral", "data-free", "sequential"},
    peers={"fusion-bench": "OPCM"},
    cost={"passes": "2", "resident": "40"},
)
class OPCM(MatrixMethod):
    """θ = θ₀ + D_T·n̄/‖D_T‖ with D_t = D_{t−1} + Δ̂_t, D_1 = Δ_1, in the order of the models.

    Δ̂_t is w_t Δ_t without its part in the leading directions of D_{t−1} = U S Vᵀ: P = Uᵀ Δ_t V loses its diagonal and
    its block of the first k directions, k the most whose share of Σ S is at most `alpha`. n̄ is the mean over t of
    ‖w_t Δ_t‖, norms over all tensors. The paper divides by λ_t after every model and multiplies by it before the next;
    directions and shares do not depend on it, so only the last one is left, and one more pass over the files gives it. The
    D_T of matrices wait for it in a temporary file (of four bytes a number; without room on the disk they are made twice).

    Hidden matrices are projected; other tensors get Δ̂_t = w_t Δ_t. Needs SVDs of T − 1 sums of each matrix, thin ones:
    Δ̂ = Δ − U (P's removed part) Vᵀ equals the paper's full bases. They come from Gram matrices in float64 (bound in
    `spectral.py`); singular values below 1e-7 of the largest count as none, so that their arbitrary directions remove
    nothing, where the authors' code removes the diagonal of a random basis.

    Args:
        alpha: share of the singular values whose directions are closed to later models, 0 … 1.
        scale: factor on the merged change.

    Raises:
        OptionError: a share outside [0, 1].
    """

    order_free = False

    def __init__(self, alpha: float = 0.5, scale: float = 1.0):
        self.alpha = check_number("alpha", alpha, 0, 1)
        self.scale = check_number("scale", scale, -100, 100)
        self._bytes: int | None = None

    def check(self, rows: Sequence[Row], config: Mapping[str, Any] | None) -> None:
        self._bytes = sum(row.numel * row.compute.itemsize for row in rows if row.action == "matrix")

    def prepare(self, scan: Scan) -> tuple[float, Spill]:
        """n̄/‖D_T‖, and the D_T of the matrices."""
        squares: list[float] = []
        kept = Spill(self._bytes)
        for found in scan(lambda base, tuned, ctx: self._squares(base, tuned, ctx, kept)):
            squares = [a + b for a, b in zip(squares, found, strict=True)] if squares else found
        *single, merged = squares or [0.0]
        return sum(x**0.5 for x in single) / len(single) / merged**0.5 if merged else 0.0, kept

    def tensor(self, base: Tensor | None, tuned: Sequence[Tensor], ctx: TensorContext) -> Tensor:
        assert base is not None
        factor, kept = ctx.shared
        found = kept.get(ctx.name)
        change = self._change(base, tuned, ctx) if found is None else found.to(base)
        return torch.add(base, change, alpha=self.scale * factor)

    def matrix(self, base: Tensor, tuned: Sequence[Tensor], ctx: TensorContext) -> Tensor:
        """D_T of one matrix."""
        total: Tensor | None = None
        for delta, w in zip(deltas(base, tuned), ctx.weights, strict=True):
            new = delta.mul_(w)
            if total is not None:
                new = self._cleaned(new, total).add_(total)
            total = new
        assert total is not None
        return total

    def _change(self, base: Tensor, tuned: Sequence[Tensor], ctx: TensorContext) -> Tensor:
        if ctx.matrix:
            return super().tensor(base, tuned, ctx)
        return weighted_sum(deltas(base, tuned), ctx.weights)

    def _squares(self, base: Tensor | None, tuned: Sequence[Tensor], ctx: TensorContext, kept: Spill) -> list[float]:
        """‖w_t Δ_t‖² for each model, then ‖D_T‖²; a matrix's D_T is put into `kept`."""
        assert base is not None
        found = [
            w * w * float(d.square_().sum(dtype=torch.float64))
            for d, w in zip(deltas(base, tuned), ctx.weights, strict=True)
        ]
        change = self._change(base, tuned, ctx)
        if ctx.matrix:
            kept.put(ctx.name, change)
        return [*found, float(change.square_().sum(dtype=torch.float64))]

    def _cleaned(self, delta: Tensor, merged: Tensor) -> Tensor:
        u, s, vh = triplets(merged, min(merged.shape[-2:]))
        known = s > 1e-7 * s[..., :1]
        total = s.sum(-1, keepdim=True)
        leading = known & (s.cumsum(-1) <= self.alpha * total)
        inside = u.mT @ delta.double() @ vh.mT
        removed = leading[..., :, None] & leading[..., None, :] | torch.diag_embed(known)
        return (delta - u @ torch.where(removed, inside, 0.0) @ vh).to(delta.dtype)
