"""Isotropic merging with common and task-specific subspaces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.catalogue import method
from deltaw.linalg import gram_polar
from deltaw.merge.base import MatrixMethod, TensorContext, check_choice, check_number, deltas, weighted_sum
from deltaw.merge.spectral import signal, triplets


@method(
    "iso-cts",
    family="merge",
    paper="arXiv:2502.04959",
    title="No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    summary="as iso-c, with the weakest common directions replaced by each task's own strongest ones",
    aliases=("iso_cts",),
    tags={"spectral", "data-free"},
    peers={"fusion-bench": "ISO_CTS_Merge"},
    cost={"passes": "2", "resident": "40"},
)
class IsoCTS(MatrixMethod):
    """θ = θ₀ + α σ̄ polar(Û) polar(V̂)ᵀ (as the authors' code has it).

    With q = min(m, n): the k strongest singular triplets of Σ_t w_t Δ_t, and from each task the s strongest of
    (I − U_k U_kᵀ) w_t Δ_t, k + T·s = q, side by side; σ̄ is the mean of their q singular values. The number of specific
    directions q − k is `common`'s complement rounded to a multiple of T. Hidden matrices only; every other tensor gets
    θ₀ + α·(1/T) Σ_t w_t Δ_t. The tuned matrices are read twice, so memory does not grow with T.

    Factorisations are those of `tsv-m`, with its bounds; directions that carry only rounding stay zero, as in `iso-c`.

    Args:
        scale: α, one for all tensors; best chosen on validation data, 1 to 2 is usual.
        common: share of the directions that is common; 1 is `iso-c`.
        mean: σ̄ over "rank", the directions that count; or over "all" q, as the paper has it. They agree at full rank.

    Raises:
        OptionError: an unknown choice, a share outside [0, 1].
    """

    def __init__(self, scale: float = 1.0, common: float = 0.8, mean: str = "rank"):
        self.scale = check_number("scale", scale, -100, 100)
        self.common = check_number("common", common, 0, 1)
        self.mean = check_choice("mean", mean, ("rank", "all"))

    def matrix(self, base: Tensor, tuned: Sequence[Tensor], ctx: TensorContext) -> Tensor:
        q = min(base.shape[-2:])
        k, own = sizes(q, len(tuned), self.common)
        left, values, right = [], [], []
        if k:
            total = weighted_sum(deltas(base, tuned), ctx.weights)
            u, s, vh = triplets(total, k)
            counts = signal(s, base, total, ctx.epsilon, sum(w * w for w in ctx.weights) ** 0.5)
            left, values, right = [u * counts[..., None, :]], [s * counts], [vh * counts[..., None]]
        for delta, w in zip(deltas(base, tuned) if own else (), ctx.weights if own else (), strict=True):
            rest = w * delta.double()
            if k:
                rest -= left[0] @ (left[0].mT @ rest)
            rest = rest.to(torch.float64 if delta.dtype == torch.float64 else torch.float32)
            u, s, vh = triplets(rest, own, leading=True)
            counts = signal(s, base, delta * w, ctx.epsilon, abs(w), projected=True)
            left.append(u * counts[..., None, :])
            values.append(s * counts)
            right.append(vh * counts[..., None])
        level = torch.cat(values, -1)
        directions = (level > 0).sum(-1, keepdim=True).clamp_min(1) if self.mean == "rank" else q
        level = (level.sum(-1, keepdim=True) / directions)[..., None]
        change = gram_polar(torch.cat(left, -1)) @ gram_polar(torch.cat(right, -2))
        return base + (self.scale * level * change).to(base.dtype)


def sizes(q: int, tasks: int, common: float) -> tuple[int, int]:
    """(common directions, directions of each task): k + T·s = q."""
    own = min(round((q - int(q * common)) / tasks), q // tasks)
    return q - own * tasks, own
