"""Model Stock: how far to go from the base to the mean, read off the angle between the fine-tunings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement

import torch
from torch import Tensor

from deltaw.catalogue import method
from deltaw.merge.base import TensorContext, deltas, normalized, weighted_sum
from deltaw.merge.pieces import ElementwiseMethod, Pieces


@method(
    "model-stock",
    family="merge",
    paper="arXiv:2403.19522",
    title="Model Stock: All we need is just a few fine-tuned models",
    summary="interpolate between base and mean by the angle between the task vectors",
    aliases=("model_stock",),
    tags={"elementwise", "data-free"},
    peers={"mergekit": "model_stock", "fusion-bench": "ModelStock"},
    cost={"passes": "1 if filter_wise else 2", "resident": "T+6"},
)
class ModelStock(ElementwiseMethod):
    """θ = r·Σ_t w_t θ_t/Σ w_t + (1−r)·θ₀ with r = T cos θ/(1 + (T−1) cos θ).

    cos θ is the mean over all pairs of the cosine of Δ_i and Δ_j, one number for each tensor. Fine-tunings of equal
    length at equal angles from the base have the middle of all possible ones there. Needs no data and no scale.

    Tensors that a model leaves unchanged have no angle; they count as orthogonal, which keeps the base. Different from
    mergekit: cosines of small changes are exact (mergekit divides by ‖Δ_i‖‖Δ_j‖ but at least by 1e-6).

    Args:
        filter_wise: one angle for each row (output) of a matrix; a vector is one row.
        clamp: take a negative cos θ as 0, which keeps the base; r then lies in [0, 1]. False follows the formula to
            negative r, as mergekit does, and keeps the base only where its denominator is 0.

    Raises:
        OptionError: weights that add up to 0.
    """

    models = (2, float("inf"))
    neutral = {}

    def __init__(self, filter_wise: bool = False, clamp: bool = True):
        self.filter_wise, self.clamp = bool(filter_wise), bool(clamp)

    def measure(self, pieces: Pieces, ctx: TensorContext) -> Tensor | None:
        """r of the whole tensor, or None where each row has its own."""
        if self._by_row(pieces.ndim):
            return None
        count = len(pieces.tuned)
        products = torch.zeros(count, count, 1, dtype=torch.float64)
        for base, tuned in pieces:
            flat = [d.reshape(-1) for d in deltas(base, tuned)]
            for i, j in combinations_with_replacement(range(count), 2):  # several times faster than one narrow product
                products[i, j] += float(torch.dot(flat[i], flat[j]))
        return self._ratio(products)

    def piece(self, base: Tensor | None, tuned: Sequence[Tensor], ctx: TensorContext) -> Tensor:
        assert base is not None
        changes = list(deltas(base, tuned))
        ratio = self._ratio(_products([_rows(d, ctx) for d in changes])) if ctx.local is None else ctx.local
        total = weighted_sum(changes, normalized(ctx.weights))
        if ctx.local is None:
            _rows(total, ctx).mul_(ratio[:, None].to(total))
        else:
            total.mul_(float(ratio))
        return total.add_(base)

    def _by_row(self, ndim: int) -> bool:
        return self.filter_wise and ndim > 1

    def _ratio(self, products: Tensor) -> Tensor:
        """r for each row, in float64, from the products ⟨Δ_i, Δ_j⟩ [T, T, rows]."""
        count = len(products)
        norms = products.diagonal().mT.sqrt()
        cosine = torch.zeros_like(norms[0])
        for i, j in combinations(range(count), 2):
            length = norms[i] * norms[j]
            cosine += torch.where(length > 0, products[i, j] / torch.where(length > 0, length, 1.0), 0.0).clamp(-1, 1)
        cosine /= count * (count - 1) / 2
        if self.clamp:
            cosine.clamp_(min=0)
        bottom = 1 + (count - 1) * cosine
        singular = bottom.abs() < 1e-6
        return torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, bottom))


def _rows(x: Tensor, ctx: TensorContext) -> Tensor:
    return x.view(len(x), -1) if ctx.site.kind == "conv" else x.view(-1, x.shape[-1])


def _products(rows: list[Tensor]) -> Tensor:
    """⟨Δ_i, Δ_j⟩ of each row, in the accumulation dtype; sums over pieces are in float64: [T, T, rows]."""
    stacked = torch.stack(rows, dim=1)
    return (stacked @ stacked.mT).permute(1, 2, 0).double()
