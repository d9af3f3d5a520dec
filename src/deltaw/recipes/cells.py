"""The smallest units of a run that are done or not done, so that a killed run loses little and resumes exactly.

A cell is a folder with its result in `cell.json`, renamed into place when it is complete. Its key holds
everything that decides the result, keys of the cells it builds on included; a finished cell with an equal key is
used again, one with another key is made anew. Cells that do not build on each other are made by several processes:
small models keep two single-threaded processes busier than one of two threads.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from deltaw.models import atomic_folder

CELL = "cell.json"


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """A cell to be made: `work(context, folder, *arguments) -> result` fills the folder. `work` is a module's function."""

    name: str
    key: str
    work: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A finished cell: where it lies and what it found."""

    folder: Path
    key: str
    result: dict[str, Any]
    seconds: float
    reused: bool


def read_cell(root: Path, job: Job) -> Cell | None:
    """The finished cell of a job, or None."""
    file = root / job.name / CELL
    if not file.is_file():
        return None
    held = json.loads(file.read_text(encoding="utf-8"))
    return Cell(root / job.name, job.key, held["result"], held["seconds"], True) if held["key"] == job.key else None


def make_cell(context: Any, root: Path, job: Job) -> None:
    """Make the cell of a job: its folder appears when it is complete."""
    folder = root / job.name
    if folder.exists():
        shutil.rmtree(folder)  # a cell of other options; its folder is ours alone
    began = time.monotonic()
    with atomic_folder(folder) as partial:
        result = job.work(context, Path(partial), *job.arguments)
        text = json.dumps({"key": job.key, "seconds": time.monotonic() - began, "result": result}, indent=1)
        (Path(partial) / CELL).write_text(text + "\n", encoding="utf-8")


@dataclass
class Cells:
    """All cells of one run under `root`.

    Args:
        context: what every job is given; a process of its own builds it anew by `context_of(*specification)`.
        workers: processes that make independent cells; with one, cells are made in this process.
        report: told of every cell that ends.
    """

    root: Path
    context_of: Callable[..., Any]
    specification: tuple[Any, ...]
    workers: int = 1
    report: Callable[[str, Cell], None] = lambda name, cell: None
    done: list[Cell] = field(default_factory=list)
    _pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Cells:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            # On an error the cells under way are dropped, not waited for: their folders are not complete.
            self._pool.shutdown(wait=error[0] is None, cancel_futures=True)
            if error[0] is not None:
                for process in multiprocessing.active_children():
                    process.terminate()

    def make(self, context: Any, jobs: Sequence[Job]) -> list[Cell]:
        """The cells of jobs that do not build on each other, in their order; those that are missing are made."""
        found = {job.name: read_cell(self.root, job) for job in jobs}
        for job in jobs:
            if (cell := found[job.name]) is not None:
                self.report(job.name, cell)
        missing = [job for job in jobs if found[job.name] is None]
        # By all jobs, not by those that are missing: how many threads a cell is made with must not depend on what a
        # killed run had finished.
        if self.workers > 1 and len(jobs) > 1 and missing:
            for job in self._in_processes(missing):
                found[job.name] = self._fresh(job)
        else:
            for job in missing:
                make_cell(context, self.root, job)
                found[job.name] = self._fresh(job)
        cells = [cell for job in jobs if (cell := found[job.name]) is not None]
        self.done += cells
        return cells

    def _fresh(self, job: Job) -> Cell:
        """Read back what was written, so that a fresh run and a resumed one go on from the same numbers."""
        cell = read_cell(self.root, job)
        assert cell is not None, job.name
        fresh = Cell(cell.folder, cell.key, cell.result, cell.seconds, False)
        self.report(job.name, fresh)
        return fresh

    def warm_up(self) -> None:
        """Start the processes now, so that they load their libraries while this one makes the first cell."""
        if self.workers > 1 and self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self.context_of, self.specification, max(1, torch.get_num_threads() // self.workers)),
            )
            for _ in range(self.workers):
                self._pool.submit(_import)

    def _in_processes(self, jobs: Sequence[Job]) -> Any:
        """Each job as it ends. The first error ends the run."""
        self.warm_up()
        assert self._pool is not None
        futures: dict[Future[None], Job] = {self._pool.submit(_work, self.root, job): job for job in jobs}
        for future in as_completed(futures):
            future.result()
            yield futures[future]


_context: Any = None


def _start(context_of: Callable[..., Any], specification: tuple[Any, ...], threads: int) -> None:
    """Set up a process of the pool: its share of the threads, its own context, and an end with its parent's."""
    global _context
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)
    _context = context_of(*specification)


def _import() -> None:
    """Load what the jobs need but for the model: transformers' Trainer takes seconds to import."""
    from transformers import Trainer

    assert Trainer is not None


def _work(root: Path, job: Job) -> None:
    make_cell(_context, root, job)
