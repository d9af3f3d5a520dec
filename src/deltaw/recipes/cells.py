"""The smallest units of a run that are done or not done, so that a killed run loses little and resumes exactly.

A cell is a folder with its result in `cell.json`, renamed into place when it is complete. Its key holds
everything that decides the result, keys of the cells it builds on included; a finished cell with an equal key is
used again, one with another key is made anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.models import atomic_folder

CELL = "cell.json"


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class Cell:
    """A finished cell: where it lies and what it found."""

    folder: Path
    key: str
    result: dict[str, Any]
    seconds: float
    reused: bool


@dataclass
class Cells:
    """All cells of one run under `root`; `report` is told of every one that ends."""

    root: Path
    report: Callable[[str, Cell], None] = lambda name, cell: None
    done: list[Cell] = field(default_factory=list)

    def make(self, name: str, key: str, work: Callable[[Path], dict[str, Any]]) -> Cell:
        """The cell `name`: read when it is there with this key, else made by `work(folder) -> result`."""
        folder = self.root / name
        cell = self._read(folder, key)
        if cell is None:
            if folder.exists():
                shutil.rmtree(folder)  # a cell of other options; its folder is ours alone
            began = time.monotonic()
            with atomic_folder(folder) as partial:
                result = work(Path(partial))
                seconds = time.monotonic() - began
                text = json.dumps({"key": key, "seconds": seconds, "result": result}, indent=1)
                (Path(partial) / CELL).write_text(text + "\n", encoding="utf-8")
            # Read back what was written, so that a fresh run and a resumed one go on from the same numbers.
            cell = self._read(folder, key)
            assert cell is not None
            cell.reused = False
        self.done.append(cell)
        self.report(name, cell)
        return cell

    def _read(self, folder: Path, key: str) -> Cell | None:
        file = folder / CELL
        if not file.is_file():
            return None
        held = json.loads(file.read_text(encoding="utf-8"))
        return Cell(folder, key, held["result"], held["seconds"], True) if held["key"] == key else None
