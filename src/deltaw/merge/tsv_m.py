"""Task singular vectors: each task's leading directions, decorrelated across tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.catalogue import method
from deltaw.linalg import gram_polar
from deltaw.merge.base import MatrixMethod, TensorContext, check_number, deltas
from deltaw.merge.spectral import signal, triplets


@method(
    "tsv-m",
    family="merge",
    paper="arXiv:2412.00081",
    title="Task Singular Vectors: Reducing Task Interference in Model Merging",
    summary="keep each task's top singular directions and make those of all tasks orthogonal",
    aliases=("tsv", "tsvm", "tsv_m"),
    tags={"spectral", "data-free"},
    peers={"fusion-bench": "TaskSingularVectorMerging"},
    cost={"passes": "1", "resident": "40"},
)
class TSVM(MatrixMethod):
    """θ = θ₀ + α polar(Û) Ŝ polar(V̂)ᵀ, with Û, Ŝ, V̂ the top k = ⌊min(m, n)/T⌋ triplets of every w_t Δ_t side by side.

    polar(Û) is the nearest frame with orthonormal columns (the paper's whitening). Hidden matrices only;
    every other tensor gets θ₀ + α·(1/T) Σ_t w_t Δ_t. Memory holds the factors of all tasks, as much as two matrices.

    Triplets and polar factors come from Gram matrices (bounds in `spectral.py` and `gram_polar`), within 1e-4 of full SVDs
    where the k-th gap is above 1e-4 of σ_k. Where directions carry only rounding, or tasks repeat
    each other's directions to 1e-6, an SVD would fill up the frames with arbitrary vectors; here they stay empty.

    Args:
        scale: α, one for all tensors; the paper takes 1.
        rank: k; None for ⌊min(m, n)/T⌋. It may not exceed min(m, n).
    """

    def __init__(self, scale: float = 1.0, rank: int | None = None):
        self.scale = check_number("scale", scale, -100, 100)
        self.rank = None if rank is None else int(check_number("rank", rank, 1, 1e9))

    def matrix(self, base: Tensor, tuned: Sequence[Tensor], ctx: TensorContext) -> Tensor:
        short = min(base.shape[-2:])
        k = min(short, self.rank or max(1, short // len(tuned)))
        left, values, right = [], [], []
        for delta, w in zip(deltas(base, tuned), ctx.weights, strict=True):
            u, s, vh = triplets(delta, k, leading=True)
            counts = signal(s, base, delta, ctx.epsilon) * (w != 0)
            left.append(u * counts[..., None, :])
            values.append(w * s * counts)
            right.append(vh * counts[..., None])
        frames = gram_polar(torch.cat(left, -1)), gram_polar(torch.cat(right, -2))
        change = (frames[0] * torch.cat(values, -1)[..., None, :]) @ frames[1]
        return base + (self.scale * change).to(base.dtype)
