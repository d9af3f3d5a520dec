"""Tensors that a first pass has made and the second needs again: kept in a file, not in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading

import torch
from torch import Tensor

_SPARE = 4  # times the room that a file may take must be free: others write there too


class Spill:
    """Keeps tensors by name in a temporary file that goes with this object; `get` gives None for what it does not hold.

    It holds nothing where the folder for temporary files has too little room, and leaves out what a full disk does not take:
    whoever uses it must be able to make a tensor again.
    """

    def __init__(self, expected: int | None) -> None:
        """`expected`: bytes of all tensors together; None when that, or a name for each, is not known: it holds nothing."""
        self._places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self._end = 0
        self._lock = threading.Lock()
        able = expected is not None and hasattr(os, "preadv")
        room = able and shutil.disk_usage(tempfile.gettempdir()).free >= _SPARE * (expected or 0)
        self._file = tempfile.TemporaryFile(prefix="deltaw-") if room else None  # noqa: SIM115

    def put(self, name: str, x: Tensor) -> None:
        """Keep `x`, if there is room."""
        if self._file is None:
            return
        content = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with self._lock:
            place = self._end
            self._end += len(content)
        done = 0
        try:
            while done < len(content):
                done += os.pwrite(self._file.fileno(), content[done:], place + done)
        except OSError:  # full: this one is made again
            return
        self._places[name] = place, tuple(x.shape), x.dtype

    def get(self, name: str) -> Tensor | None:
        """What was kept under this name, on the CPU."""
        if name not in self._places or self._file is None:
            return None
        place, shape, dtype = self._places[name]
        out = torch.empty(shape, dtype=dtype)
        content = out.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(content):
            count = os.preadv(self._file.fileno(), [content[done:]], place + done)
            if not count:
                return None
            done += count
        return out
