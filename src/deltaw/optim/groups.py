"""Checks of parameter groups before they are accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltaw.errors import OptionError, unknown_name
from deltaw.optim import checks

#: keys of a group that are not options of its chain
FIXED_KEYS = ("params", "param_names", "chain", "views", "lr", "weight_decay", "maximize", "initial_lr")


def distinct_entries(group: Mapping[str, Any], index: int) -> list[Any]:
    """The parameters (or (name, parameter) pairs) of a group, each object once: tied weights take one update.

    Raises OptionError when there are none.
    """
    params = group.get("params", ())
    entries = [params] if isinstance(params, Tensor) else list(params)
    if not entries:
        raise OptionError(f"parameter group {index} is empty: leave it out, or check what selected its parameters")
    once: dict[int, Any] = {}
    for entry in entries:
        once.setdefault(id(entry[1] if isinstance(entry, tuple) else entry), entry)
    if "views" in group and len(once) != len(entries):
        raise OptionError(f"parameter group {index} has views and names a parameter twice: list each once")
    return list(once.values())


def check_group(group: Mapping[str, Any], index: int, options: Mapping[str, Any], names: list[str]) -> None:
    """Raise OptionError unless keys, rates, views and dtypes of a group are sound. `options`: those of its chain."""
    unknown = set(group) - set(FIXED_KEYS) - set(options)
    if unknown:
        known = [*options, *FIXED_KEYS[1:6]]
        raise unknown_name(f"option in parameter group {index}", min(unknown), known)
    checks.number(f"lr of parameter group {index}", group["lr"])
    checks.number(f"weight_decay of parameter group {index}", group["weight_decay"])
    if "views" in group and len(group["views"]) != len(group["params"]):
        raise OptionError(f"parameter group {index}: {len(group['views'])} views for {len(group['params'])} parameters")
    for p, name in zip(group["params"], names, strict=True):
        if not p.is_floating_point():
            raise OptionError(
                f"parameter {name!r} has dtype {p.dtype}: only real floating-point parameters can be optimized; set "
                "requires_grad=False on the others and leave them out"
            )


def check_devices(groups: list[dict[str, Any]]) -> None:
    """Raise OptionError when parameters are on several kinds of device: mostly a model moved by half."""
    kinds = sorted({p.device.type for g in groups for p in g["params"]})
    if len(kinds) > 1:
        raise OptionError(f"parameters on several kinds of device ({', '.join(kinds)}): move the model first")
