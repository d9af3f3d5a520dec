"""Threads and memory of the streaming engine's workers."""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from deltaw.merge.base import MergeMethod
from deltaw.merge.pieces import ElementwiseMethod

T = TypeVar("T")
R = TypeVar("R")

#: bytes of results that may wait behind an earlier one
AHEAD = 1 << 26


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


def keep_freed_memory() -> None:
    """Let the workers' memory stay with the process from one tensor to the next, up to some 30 MB a thread.

    glibc gives a block that it took from the system, or the top of an arena, back as soon as it is freed when it is
    larger than it has seen before; then every piece and every result is mapped anew, page by page. One freed block of 31
    MB, the most that it learns from, raises both bounds.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@contextmanager
def one_thread_each(method: MergeMethod) -> Iterator[None]:
    """One thread of torch for each worker while pieces are merged: they are too small to share, and waiting costs more.

    It also keeps sums, which torch splits by its threads, the same everywhere.
    """
    before = torch.get_num_threads()
    if not isinstance(method, ElementwiseMethod) or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def ordered(
    threads: int, function: Callable[[T], R], items: Sequence[T], size: Callable[[T], int] | None = None
) -> Iterator[Iterator[R]]:
    """Results of `function` over `items` from worker threads, in order, at most `threads` ahead of the consumer.

    With `size`, the bytes of an item's result, further ahead while what comes after the next result takes no more than
    `AHEAD` bytes, so that one large tensor does not hold up all workers.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="merge")

    def results() -> Iterator[R]:
        pending: deque[tuple[Future[R], int]] = deque()
        later = 0  # bytes of all that are pending but the first
        for item in items:
            more = AHEAD + 1 if size is None or threads == 1 else size(item)
            while len(pending) >= threads and later + more > AHEAD:
                future = pending.popleft()[0]
                later -= pending[0][1] if pending else 0
                yield future.result()
            later += more if pending else 0
            pending.append((pool.submit(function, item), more))
        while pending:
            yield pending.popleft()[0].result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)
