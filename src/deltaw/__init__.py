"""deltaw: every structured way to change a weight matrix.

The verbs live here; each is imported from its room when it is first used, so `import deltaw` costs next to
nothing on top of torch.

    import deltaw
    deltaw.adapt(model, "lora", targets="all-linear", rank=8)
    optimizer = deltaw.optimizer(model, "normuon", lr=0.02)
    deltaw.explain(model, "normuon")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: verb -> (room, name in that room)
_VERBS: dict[str, tuple[str, str]] = {
    "adapt": ("deltaw.adapters", "adapt"),
    "save_adapter": ("deltaw.adapters", "save_adapter"),
    "load_adapter": ("deltaw.adapters", "load_adapter"),
    "fold": ("deltaw.adapters", "fold"),
    "export_lora": ("deltaw.adapters", "export_lora"),
    "optimizer": ("deltaw.optim", "optimizer"),
    "explain": ("deltaw.optim", "explain"),
    "hf_factory": ("deltaw.optim", "hf_factory"),
    "merge": ("deltaw.merge", "merge"),
    "compress": ("deltaw.compress", "compress"),
    "load": ("deltaw.train", "load"),
    "inspect": ("deltaw.inspect", "inspect"),
    "train": ("deltaw.train", "train"),
    "run": ("deltaw.recipes", "run"),
    "DeltawError": ("deltaw.errors", "DeltawError"),
}

__all__ = ["__version__", *_VERBS]  # noqa: PLE0604

if TYPE_CHECKING:
    from deltaw.adapters import adapt, export_lora, fold, load_adapter, save_adapter
    from deltaw.compress import compress
    from deltaw.errors import DeltawError
    from deltaw.inspect import inspect
    from deltaw.merge import merge
    from deltaw.optim import explain, hf_factory, optimizer
    from deltaw.recipes import run
    from deltaw.train import load, train


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'deltaw' has no attribute {name!r}")
    room, attribute = _VERBS[name]
    return getattr(importlib.import_module(room), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
