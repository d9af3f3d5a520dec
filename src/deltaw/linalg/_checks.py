"""Argument checks shared by the routines of this room."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaw.errors import NonFiniteError, OptionError


def require_matrix(x: Tensor, name: str = "x") -> None:
    """Raise `OptionError` unless `x` is a floating tensor [..., m, n]."""
    if x.ndim < 2:
        raise OptionError(f"{name} has shape {tuple(x.shape)}; expected a matrix [..., m, n]: reshape it first")
    if not x.is_floating_point():
        raise OptionError(f"{name} has dtype {x.dtype}; expected a real floating dtype: convert it first")


def require_square(x: Tensor, name: str = "x") -> None:
    """Raise `OptionError` unless `x` is a floating tensor [..., n, n]."""
    require_matrix(x, name)
    if x.shape[-1] != x.shape[-2]:
        raise OptionError(f"{name} has shape {tuple(x.shape)}; expected a square matrix [..., n, n]")


def require_finite(x: Tensor, name: str = "x") -> None:
    """Raise `NonFiniteError` if `x` holds NaN or infinity (LAPACK's own message names neither)."""
    # a sum is finite only if every term is, and makes no mask; sums of large finite terms may overflow, so look again
    if not math.isfinite(float(x.detach().sum())) and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise NonFiniteError(
            f"{name} of shape {tuple(x.shape)} has {bad} non-finite entries; expected finite numbers: "
            "look for the layer or batch they come from, or skip it"
        )


def require_rank(rank: int, shape: tuple[int, ...] | torch.Size, name: str = "rank") -> None:
    """Raise `OptionError` unless 1 <= rank <= min(m, n)."""
    limit = min(shape[-2:])
    if not 1 <= rank <= limit:
        raise OptionError(
            f"{name}={rank} does not fit a matrix of shape {tuple(shape)}; expected 1 … {limit}: choose a smaller rank"
        )


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype LAPACK routines run in for input of `dtype`: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
