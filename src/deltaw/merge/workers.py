"""Threads of the streaming engine."""

from __future__ import annotations

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
