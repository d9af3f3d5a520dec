"""Where tensors come from: a checkpoint folder, a state dict or a module, read through one small interface."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapters import StoredAdapter
from deltaw.errors import CheckpointError, NonFiniteError, OptionError
from deltaw.models import Checkpoint, open_checkpoint


class Source(ABC):
    """One model of a merge: names, shapes and dtypes at once, tensors when asked for.

    Attributes:
        label: how messages, the plan and the model card call it.
        config: content of config.json, or None.
        folder: where the files beside the weights are, or None.
        aliases: names that this model stores under another name (a tied output head).
    """

    def __init__(self, label: str, config: Mapping[str, Any] | None = None, folder: Path | None = None):
        self.label = label
        self.config = config
        self.folder = folder
        self.aliases: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def read(self, name: str) -> Tensor:
        """The stored tensor, not to be written to: it may be a memory map or the caller's own."""
        return self._get(self.aliases.get(name, name)).detach()

    def alias(self, name: str, stored: str) -> None:
        """Let `name` mean the tensor stored as `stored`."""
        self.aliases[name] = stored
        self.shapes[name], self.dtypes[name] = self.shapes[stored], self.dtypes[stored]

    def tied(self) -> dict[str, str]:
        """name -> earlier name of the same memory."""
        return {}

    def fingerprint(self) -> Any | None:
        """What must be equal for a merge to be continued; None when it cannot be told cheaply."""
        return None

    #: how many tensors of the read one's size `read` holds for a moment beside it, at most
    overhead: int = 0
    #: `read` hands out what is stored, without arithmetic, so that a part can be read alone
    stored: bool = True

    def precision(self, name: str) -> torch.dtype:
        """The dtype to which the values of a tensor are rounded."""
        return self.dtypes[name]

    def device(self, name: str) -> torch.device:
        """Where a tensor is."""
        return self.read(name).device

    @abstractmethod
    def _get(self, name: str) -> Tensor:
        """The tensor stored under `name`."""


class FolderSource(Source):
    """A safetensors folder or file."""

    def __init__(self, checkpoint: Checkpoint, label: str):
        super().__init__(label, checkpoint.config, checkpoint.folder)
        self._checkpoint = checkpoint
        for name in checkpoint.keys():  # noqa: SIM118
            self.shapes[name], self.dtypes[name] = checkpoint.shape(name), checkpoint.dtype(name)

    def _get(self, name: str) -> Tensor:
        return self._checkpoint.get(name, copy=False)

    def fingerprint(self) -> Any:
        stats = [(p, p.stat()) for p in self._checkpoint.files]
        return [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in stats]


class DictSource(Source):
    """A state dict held in memory, or a module."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str, config: Mapping[str, Any] | None = None):
        super().__init__(label, config)
        self._tensors = tensors
        for name, t in tensors.items():
            if not isinstance(t, Tensor):
                raise OptionError(f"{label}: {name!r} is a {type(t).__name__}; expected a state dict of tensors")
            self.shapes[name], self.dtypes[name] = tuple(t.shape), t.dtype

    def _get(self, name: str) -> Tensor:
        return self._tensors[name]

    def tied(self) -> dict[str, str]:
        # A state dict holds detached tensors, so memory, not identity, tells which names are one parameter.
        first: dict[Any, str] = {}
        found = {}
        for name, t in self._tensors.items():
            if t.numel() == 0 or t.device.type == "meta":
                continue
            key = (t.device, t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype)
            holder = first.setdefault(key, name)
            if holder != name:
                found[name] = holder
        return found


class AdapterSource(Source):
    """A model given as a base and an adapter folder: W + ΔW, made for each tensor when it is read.

    Values are float32 or wider; `dtypes` says how the base stores them, which is how the output will.
    """

    stored = False

    def __init__(self, base: Source, adapter: StoredAdapter, label: str):
        super().__init__(label, base.config, base.folder)
        self._base, self._adapter, self.overhead = base, adapter, adapter.overhead
        self.shapes, self.dtypes = dict(base.shapes), dict(base.dtypes)
        for name, tensor in adapter.saved.items():
            self.shapes[name], self.dtypes[name] = tuple(tensor.shape), base.dtypes.get(name, tensor.dtype)

    def _get(self, name: str) -> Tensor:
        if name in self._adapter.saved:
            return self._adapter.saved[name]
        weight = self._base.read(name)
        return self._adapter.changed(name, weight) if name in self._adapter.sites else weight

    def precision(self, name: str) -> torch.dtype:
        stored = self.aliases.get(name, name)
        if stored in self._adapter.saved:
            return self._adapter.saved[stored].dtype
        dtype = self.dtypes[stored]
        return torch.promote_types(dtype, torch.float32) if stored in self._adapter.sites else dtype

    def device(self, name: str) -> torch.device:
        stored = self.aliases.get(name, name)
        return self._base.device(stored) if stored in self._base.shapes else self.read(name).device

    def tied(self) -> dict[str, str]:
        return self._base.tied()

    def fingerprint(self) -> Any | None:
        below = self._base.fingerprint()
        stats = [(p, p.stat()) for p in self._adapter.files]
        return None if below is None else [below, [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in stats]]


def holds_adapter(what: Any) -> bool:
    """Whether this is the path of an adapter folder."""
    names = ("adapter_config.json", "deltaw_adapter.json")
    return isinstance(what, (str, Path)) and any((Path(what).expanduser() / name).is_file() for name in names)


def open_source(what: Any, label: str, base: Source | None = None) -> Source:
    """A source for a folder or file (path), a state dict, a module or an open `Checkpoint`; with `base`, for the folder
    of an adapter on it too.

    Raises:
        CheckpointError: from `open_checkpoint` and `StoredAdapter`; a quantised checkpoint, whose packed integers
            cannot be averaged; an adapter without its base; a factored model.
        OptionError: none of these kinds.
    """
    source: Source
    match what:
        case Source():
            source = what
        case str() | Path():
            if holds_adapter(what):
                if base is None:
                    raise CheckpointError(
                        f"{what} holds an adapter, not a whole model; give the model that it was trained on as the base"
                    )
                return AdapterSource(base, StoredAdapter(what, base.shapes, base.config), str(what))
            source = FolderSource(open_checkpoint(what), str(what))
        case Checkpoint():
            source = FolderSource(what, str(what.folder))
        case nn.Module():
            config = getattr(what, "config", None)
            content = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
            source = DictSource(what.state_dict(), label, content)
        case Mapping():
            source = DictSource(what, label)
        case _:
            raise OptionError(f"{label} is a {type(what).__name__}; expected a model folder, a state dict or a module")
    if source.config and source.config.get("quantization_config"):
        kind = source.config["quantization_config"].get("quant_method", "unknown method")
        raise CheckpointError(
            f"{source.label} is quantised ({kind}); its packed numbers cannot be merged. Give the model in float16, "
            "bfloat16 or float32"
        )
    if source.config and source.config.get("deltaw_factored"):
        raise CheckpointError(
            f"{source.label} is a factored model; a mean of factors is not the mean of their products. Merge first and "
            "compress the result, or give its dense form (save_compressed(…, dense=True))"
        )
    return source


class Tuned(Sequence[Tensor]):
    """The tuned models' tensors of one name in the accumulation dtype, read and checked when asked for."""

    def __init__(self, sources: Sequence[Source], name: str, dtype: torch.dtype, device: torch.device | None):
        self._sources, self._name, self._dtype, self._device = sources, name, dtype, device

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, t: Any) -> Any:
        return load(self._sources[t], self._name, self._dtype, self._device)


def load(source: Source, name: str, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """One tensor in `dtype` on `device` (None: where it is). Raises NonFiniteError with model, tensor and count."""
    x = source.read(name).to(device=device, dtype=dtype)
    check_finite(source, name, x)
    return x


def check_finite(source: Source, name: str, x: Tensor) -> None:
    """Raise NonFiniteError with model, tensor and count where `x`, the tensor or a part of it, is not finite."""
    if not all_finite(x):
        whole = source.read(name)
        raise NonFiniteError(
            f"tensor {name!r} of {source.label} has {int((~torch.isfinite(whole)).sum()):,} entries that are NaN or "
            f"infinite (of {whole.numel():,}); expected finite weights: repair or leave out that model, or exclude the "
            "tensor"
        )


def all_finite(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether `x` holds no NaN and no infinity. `dtype`: to add its entries up in."""
    # A sum is finite only if every term is, and costs no mask; large finite terms may overflow, so look again.
    return math.isfinite(float(x.sum(dtype=dtype))) or bool(torch.isfinite(x).all())
