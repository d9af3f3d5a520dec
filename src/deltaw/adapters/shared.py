"""Frozen random bases that all layers of a model share, kept once.

They are neither parameters nor buffers: no state dict holds them, no `.to(bfloat16)` rounds them, no data-parallel
wrapper sends them. Each is drawn on the CPU, rebuilt bit for bit from its seed, and compared by checksum when an
adapter is loaded; the device copy is made when a layer first asks for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


class SharedBases:
    """Groups of named tensors, one group for each method, seed and sizes. The root module and its structures hold it."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, Tensor]] = {}
        self._placed: dict[tuple[str, str, torch.device], Tensor] = {}

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a group under its `group_key`; an equal one that is there already serves instead."""
        self.groups.setdefault(key, dict(tensors))

    def get(self, key: str, name: str, device: torch.device) -> Tensor:
        """One tensor of a group, on `device`."""
        if device.type == "cpu":
            return self.groups[key][name]
        place = (key, name, device)
        if place not in self._placed:
            self._placed[place] = self.groups[key][name].to(device)
        return self._placed[place]


def ternary(uniform: Tensor, tail: float) -> Tensor:
    """−1, 0, +1 from draws of U(0, 1), each sign with probability `tail`, divided by the deviation."""
    signs = (uniform > 1 - tail).float() - (uniform < tail).float()
    return signs / signs.std().clamp_min(1e-12)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of SHA-256 over names, shapes and float32 bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def group_key(method: str, tensors: Mapping[str, Tensor]) -> str:
    """A name for a group, equal for equal content: "method:checksum"."""
    return f"{method}:{checksum(tensors)}"
