"""Dtypes as users give them: an object, or a name on the command line and in recipes."""

from __future__ import annotations

import torch

from deltaw.errors import OptionError


def floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype from an object or its name ("bfloat16", "torch.float32"); None stays None.

    Raises:
        OptionError: anything else.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is not None and isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    if dtype is None:
        return None
    raise OptionError(f"dtype={dtype!r}: expected a floating-point dtype such as 'float32', 'bfloat16', 'float16'")
