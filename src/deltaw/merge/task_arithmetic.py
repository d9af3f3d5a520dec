"""Task arithmetic: adding and subtracting task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.catalogue import method
from deltaw.merge.base import TensorContext, check_number, deltas, normalized, weighted_sum
from deltaw.merge.pieces import ElementwiseMethod


@method(
    "task-arithmetic",
    family="merge",
    paper="arXiv:2212.04089",
    title="Editing Models with Task Arithmetic",
    summary="add the scaled sum of the task vectors θ_t − θ₀ to the base",
    aliases=("task_arithmetic",),
    tags={"elementwise", "data-free"},
    peers={"mergekit": "task_arithmetic", "fusion-bench": "TaskArithmeticAlgorithm"},
    cost={"passes": "1", "resident": "3"},
)
class TaskArithmetic(ElementwiseMethod):
    """θ = θ₀ + λ Σ_t w_t Δ_t with Δ_t = θ_t − θ₀, for every floating-point tensor (section 2 of the paper).

    A weight of −1 forgets a task; the analogy "a is to b as c is to …" is weights (−1, 1, 1) on (a, b, c).

    Args:
        scale: λ, one for the whole model, best tuned on validation data over 0, 0.05, …, 1. The default 0.4 is
            a usual optimum for eight tasks; 1/T is the cautious choice, 1 restores a single tuned model.
        normalize: divide by Σ w_t.

    Raises:
        OptionError: `normalize` with weights that add up to 0.
    """

    neutral = {"scale": 1.0, "normalize": True}

    def __init__(self, scale: float = 0.4, normalize: bool = False):
        self.scale = check_number("scale", scale, -100, 100)
        self.normalize = normalize

    def shows_nonfinite(self, ctx: TensorContext) -> bool:
        return all(ctx.weights)  # a weight of 0 leaves its model out

    def piece(self, base: Tensor | None, tuned: Sequence[Tensor], ctx: TensorContext) -> Tensor:
        assert base is not None
        weights = normalized(ctx.weights) if self.normalize else ctx.weights
        return torch.add(base, weighted_sum(deltas(base, tuned), weights), alpha=self.scale)
