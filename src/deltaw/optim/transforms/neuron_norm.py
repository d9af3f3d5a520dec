"""Equalising the norms of neurons (rows) by their running second moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.optim import checks
from deltaw.optim.context import Context
from deltaw.optim.transform import Stacked, TensorSpec, Transform


@dataclass(frozen=True)
class NeuronNorm(Transform):
    """v ← β₂v + (1−β₂)·mean_cols(U⊙U), U ← U / (√v + ε) row by row (arXiv:2510.05491, Algorithm 1).

    No bias correction: a common factor of the rows, which the norm that follows removes. With `preserve_norm`
    (the authors' code) the result is rescaled to the Frobenius norm that U came with.

    State: `second_moment` [m, 1], float32 or wider.
    """

    beta2: float = 0.95
    eps: float = 1e-10
    preserve_norm: bool = False
    sharding = "rows"

    def __post_init__(self) -> None:
        checks.fraction("beta2", self.beta2)
        checks.number("eps", self.eps)

    def state_spec(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {"second_moment": TensorSpec((shape[0], 1), torch.promote_types(dtype, torch.float32))}

    def update(self, u: Tensor, state: Stacked, ctx: Context) -> Tensor:
        v = state["second_moment"]
        squares = torch.linalg.vector_norm(u, dim=-1, keepdim=True, dtype=v.dtype).square()
        v.lerp_(squares / u.shape[-1], 1 - self.beta2)
        factor = 1 / (v.sqrt() + self.eps)
        if self.preserve_norm:
            # both norms from the row sums: no further pass over the matrices
            before = ctx.total(squares.sum(-2, keepdim=True))
            after = ctx.total((squares * factor.square()).sum(-2, keepdim=True))
            factor = factor * (before.sqrt() / (after.sqrt() + self.eps))
        return u.mul_(factor) if u.dtype == factor.dtype else u * factor


neuron_norm = NeuronNorm
