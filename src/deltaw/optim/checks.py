"""Range checks of hyperparameters: each raises OptionError naming the option, what was found and what is expected."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from deltaw.errors import OptionError, unknown_name


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, below: bool = False) -> float:
    """`value` as a float in [low, high], or [low, high) with `below`. Accepts tensors of one element."""
    expected = f"a number in [{low:g}, {high:g}{')' if below or high == math.inf else ']'}"
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise OptionError(f"{name}: a tensor of shape {tuple(value.shape)}; expected {expected}, one element")
        value = value.detach().item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"{name}={value!r} is a {type(value).__name__}; expected {expected}")
    inside = math.isfinite(value) and low <= value and (value < high if below else value <= high)
    if not inside:
        raise OptionError(f"{name}={value!r}; expected {expected}")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """A decay rate: a number in [0, 1)."""
    return number(name, value, 0.0, 1.0, below=True)


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """One of the `allowed` strings; else UnknownNameError with the nearest."""
    pool = list(allowed)
    if value not in pool:
        raise unknown_name(f"value of {name}", str(value), pool, f"Expected one of {', '.join(map(repr, pool))}.")
    return value
