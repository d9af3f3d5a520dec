"""How much of its freed memory the process keeps: what to ask of glibc's allocator. Elsewhere all of it does nothing."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch


@functools.cache
def keep_freed_memory() -> None:
    """Let up to 16 MB of freed memory stay with each thread of the process, from one matrix to the next.

    glibc gives a block that it took from the system, or the top of an arena, back as soon as it is freed when it is
    larger than any that it has seen freed before. Temporaries of a megabyte may then be mapped anew time after time, page by
    page: 20% of a merge, 10% of a step of Muon. One freed block of 8 MB raises both bounds, to 8 and to 16 MB.
    """
    torch.empty(8 << 20, dtype=torch.uint8)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None


def return_freed_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps blocks of up to 32 MB in an arena per thread once one was freed; over a large model that adds up to
    several times what is in use.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
