"""The polar factor as a transform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw import linalg
from deltaw.errors import OptionError
from deltaw.models import floating_dtype
from deltaw.optim.context import Context
from deltaw.optim.transform import Stacked, Transform


@dataclass(frozen=True)
class Orthogonalize(Transform):
    """Replace each matrix by its polar factor UVᵀ: the steepest direction in the spectral norm.

    Options as in `deltaw.linalg.orthogonalize`. `dtype` None computes in bfloat16, for float64 parameters in
    float64; on accelerators the stack is formed in that dtype, so the cast costs no pass of its own.
    """

    method: str = "auto"
    steps: int | None = None
    coefficients: Any = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", floating_dtype(self.dtype))
        if self.coefficients is not None and not isinstance(self.coefficients, str):
            try:
                triples = tuple((float(a), float(b), float(c)) for a, b, c in self.coefficients)
            except (TypeError, ValueError):
                raise OptionError(
                    f"coefficients={self.coefficients!r}; expected the name of a set, or one (a, b, c) for each step"
                ) from None
            object.__setattr__(self, "coefficients", triples)
        # an unknown method or a bad step count shows here, not in the first step
        self._polar(torch.eye(2), torch.float32)

    def stack_dtype(self, weight: Tensor) -> torch.dtype:
        # on the CPU the iteration itself picks the faster of float32 and bfloat16, so nothing is gained by a cast here
        return weight.dtype if weight.device.type == "cpu" else self._compute(weight.dtype)

    def update(self, u: Tensor, state: Stacked, ctx: Context) -> Tensor:
        return self._polar(u, self._compute(ctx.weights[0].dtype))

    def _compute(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype or (torch.float64 if dtype == torch.float64 else torch.bfloat16)

    def _polar(self, u: Tensor, dtype: torch.dtype) -> Tensor:
        return linalg.orthogonalize(u, self.method, self.steps, dtype=dtype, coefficients=self.coefficients)


orthogonalize = Orthogonalize
