"""Writing checkpoints: sharded safetensors folders that appear whole or not at all, and can be continued."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deltaw.errors import CheckpointError, OptionError
from deltaw.models.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from deltaw.models.folders import RESUME_FILE, atomic_folder, disk_reason, free_bytes

_SHARD = re.compile(r"model(-\d{5}(-of-\d{5})?)?\.safetensors")


class CheckpointWriter:
    """Write tensors one by one into a sharded safetensors folder.

    A shard is held in memory until it is full, so memory is bounded by `max_shard_bytes` plus one tensor; a tensor
    larger than that gets a shard of its own. Everything grows in `OUT.partial` and is renamed to `OUT` when the
    `with` block ends; when it fails nothing is left, unless `resume_key` is given: then the finished shards stay,
    and the next writer with an equal key lists their tensors in `finished`.

    Args:
        out: the folder to make.
        max_shard_bytes: size at which a shard is closed.
        metadata: strings for the headers and the index ({"format": "pt"} is added, which transformers asks for).
        overwrite, resume_key, resume: as in `atomic_folder`.

    Raises:
        CheckpointError: on entry for an existing `OUT`; on writing for a full disk or a repeated name.

    Example:
        >>> with CheckpointWriter("models/mine") as writer:             # doctest: +SKIP
        ...     writer.write("layer.weight", torch.zeros(4, 3))
        ...     writer.text("config.json", "{}")
    """

    def __init__(
        self,
        out: str | Path,
        max_shard_bytes: float = 5e9,
        metadata: dict[str, str] | None = None,
        *,
        overwrite: bool = False,
        resume_key: dict[str, Any] | None = None,
        resume: str = "auto",
    ):
        if max_shard_bytes <= 0:
            raise OptionError(f"max_shard_bytes is {max_shard_bytes}; expected a positive number of bytes")
        self.out = Path(out).expanduser()
        self.max_shard_bytes = int(max_shard_bytes)
        self.metadata = {"format": "pt", **{str(k): str(v) for k, v in (metadata or {}).items()}}
        self._open = lambda: atomic_folder(self.out, resume_key, overwrite=overwrite, resume=resume)
        self._buffer: dict[str, Tensor] = {}
        self._buffered = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total = 0
        self._written: set[str] = set()
        self._stack = ExitStack()

    @property
    def folder(self) -> Path:
        """`OUT.partial` while writing."""
        return self._folder

    @property
    def finished(self) -> frozenset[str]:
        """Names of the tensors written so far, those of a continued run included."""
        return frozenset(self._written)

    def __enter__(self) -> CheckpointWriter:
        self._folder = self._stack.enter_context(self._open())
        try:
            self._adopt()
        except BaseException as e:
            self._stack.__exit__(type(e), e, e.__traceback__)
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as e:
                self._stack.__exit__(type(e), e, e.__traceback__)
                raise
        self._stack.__exit__(kind, error, trace)

    def write(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; it is copied, so the caller may change or drop it at once."""
        if name in self._written:
            raise CheckpointError(f"tensor {name!r} was already written to {self.out}; names must differ")
        size = tensor.numel() * tensor.element_size()
        if self._buffer and self._buffered + size > self.max_shard_bytes:
            self._flush()
        self._buffer[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._buffered += size
        self._written.add(name)

    def copy(self, path: str | Path, name: str | None = None) -> None:
        """Copy a further file (configuration, tokenizer) into the folder, as `name` or under its own name."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing and cannot be copied into {self.out}")
        shutil.copyfile(path, self._extra(name or path.name))

    def text(self, name: str, content: str) -> None:
        """Write a further text file into the folder."""
        self._extra(name).write_text(content, encoding="utf-8")

    def _extra(self, name: str) -> Path:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.name:
            raise CheckpointError(f"file name {name!r} leaves the output folder {self.out}")
        if _SHARD.fullmatch(name) or name in (INDEX_FILE, RESUME_FILE):
            raise CheckpointError(f"file name {name!r} is kept for the weights of {self.out}; choose another")
        target = self._folder / parts
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _adopt(self) -> None:
        """Take over the shards that an interrupted run finished."""
        for path in sorted(self._folder.iterdir()):
            if path.name.startswith(".tmp"):  # safetensors' own temporary file, from a killed write
                path.unlink()
            elif _SHARD.fullmatch(path.name):
                with open_checkpoint(path) as shard:
                    names = shard.keys()
                    self._total += sum(shard.nbytes(n) for n in names)
                self._shards.append((path, names))
                self._written.update(names)

    def _flush(self) -> None:
        if not self._buffer:
            return
        path = self._folder / f"model-{len(self._shards) + 1:05d}.safetensors"
        if free_bytes(self._folder) < self._buffered:
            raise OSError(errno.ENOSPC, f"it needs {self._buffered:,} bytes", str(path))
        # safetensors writes a temporary file and renames it; its mode is private, so take that of a plain new file
        path.touch()
        mode = path.stat().st_mode
        path.unlink()
        try:
            save_file(self._buffer, path, metadata=self.metadata)
        except SafetensorError as e:
            reason = disk_reason(e)
            if reason is None:
                raise
            raise OSError(errno.ENOSPC, f"{reason}, it needs {self._buffered:,} bytes", str(path)) from e
        os.chmod(path, mode)
        self._shards.append((path, list(self._buffer)))
        self._total += self._buffered
        self._buffer, self._buffered = {}, 0

    def _finish(self) -> None:
        self._flush()
        (self._folder / INDEX_FILE).unlink(missing_ok=True)
        if not self._shards:
            raise CheckpointError(f"no tensor was written to {self.out}")
        count = len(self._shards)
        table: dict[str, str] = {}
        for i, (path, names) in enumerate(self._shards, start=1):
            name = SINGLE_FILE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            path.rename(self._folder / name)
            table.update(dict.fromkeys(names, name))
        if count > 1:
            index = {
                "metadata": {**self.metadata, "total_size": self._total},
                "weight_map": dict(sorted(table.items())),
            }
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
