"""Spreading independent matrices over the CPU's threads, one single-threaded worker each.

For matrices of a few hundred rows this beats threads inside every product: there is no barrier per operation, which
on a busy machine costs a scheduler's slice each, and each worker's buffers stay in its own cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget() -> None:
    """After a fork the threads are gone and the lock may be held: start afresh in the child."""
    global _lock, _pool, _pool_size
    _lock, _pool, _pool_size = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def share_out(count: int, work: Callable[[range], None]) -> None:
    """Call `work` on disjoint ranges that cover 0 … count − 1, on as many threads as torch is set to use.

    torch's thread count is one during the call and restored after it; a second call that arrives meanwhile from another
    thread runs serially. `work` must not use autograd; an exception in any range is raised here.
    """
    threads = min(torch.get_num_threads(), count)
    if threads <= 1 or not _lock.acquire(blocking=False):
        work(range(count))
        return
    inference = torch.is_inference_mode_enabled()

    def guarded(part: range) -> None:
        # both modes are per thread, and what was made under inference mode may only be written under it
        with torch.inference_mode(inference), torch.no_grad():
            work(part)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        pool = _workers(before - 1)
        futures = [pool.submit(guarded, range(first, count, threads)) for first in range(1, threads)]
        try:
            guarded(range(0, count, threads))
        finally:
            errors = [future.exception() for future in futures]  # waits: nobody writes after we return
        for error in errors:
            if error is not None:
                raise error
    finally:
        torch.set_num_threads(before)
        _lock.release()


def _workers(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < size:
        if _pool is not None:
            _pool.shutdown(wait=True)
        _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="deltaw-linalg"), size
    return _pool
