"""Weight averaging (Model soups)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deltaw.catalogue import method
from deltaw.merge.base import TensorContext, normalized, weighted_sum
from deltaw.merge.pieces import ElementwiseMethod


@method(
    "linear",
    family="merge",
    paper="arXiv:2203.05482",
    title="Model soups: averaging weights of multiple fine-tuned models",
    summary="weighted mean of the models' weights",
    aliases=("soup", "average"),
    tags={"elementwise", "data-free"},
    peers={"mergekit": "linear", "fusion-bench": "WeightedAverageAlgorithm"},
    cost={"passes": "1", "resident": "3"},
)
class Linear(ElementwiseMethod):
    """θ = Σ_t w_t θ_t / Σ_t w_t for every floating-point tensor alike (Model soups, eq. 1).

    Weights that are one-hot give that model bit for bit when the dtype is kept.

    Args:
        normalize: divide by Σ w_t; False keeps the plain weighted sum.

    Raises:
        OptionError: `normalize` with weights that add up to 0.
    """

    needs_base = False
    neutral = {}

    def __init__(self, normalize: bool = True):
        self.normalize = normalize

    def shows_nonfinite(self, ctx: TensorContext) -> bool:
        return all(ctx.weights)  # a weight of 0 leaves its model out

    def piece(self, base: Tensor | None, tuned: Sequence[Tensor], ctx: TensorContext) -> Tensor:
        return weighted_sum(tuned, normalized(ctx.weights) if self.normalize else ctx.weights)
