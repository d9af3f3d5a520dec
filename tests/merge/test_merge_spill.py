"""Tensors kept in a temporary file between two passes."""

from __future__ import annotations

import shutil

import pytest
import torch

from deltaw.merge import merge, spill


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_kept_comes_back_bit_for_bit(dtype):
    kept = spill.Spill(10_000)
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, shape in enumerate([(3, 4), (0, 2), (5,), (2, 3, 4)])}
    for name, x in tensors.items():
        kept.put(name, x.mT if x.ndim == 2 else x)
    for name, x in tensors.items():
        found = kept.get(name)
        assert found is not None
        assert torch.equal(found, x.mT if x.ndim == 2 else x)
    assert kept.get("another") is None


def test_nothing_is_kept_without_room(monkeypatch):
    monkeypatch.setattr(spill, "_SPARE", 10**9)
    kept = spill.Spill(10_000)
    kept.put("t", torch.ones(3))
    assert kept.get("t") is None
    assert spill.Spill(None).get("t") is None


def test_a_full_disk_leaves_the_tensor_out(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    kept = spill.Spill(10_000)
    monkeypatch.setattr(spill.os, "pwrite", full)
    kept.put("t", torch.ones(3))
    assert kept.get("t") is None


def test_opcm_is_the_same_with_and_without_room(monkeypatch):
    g = torch.Generator().manual_seed(0)
    name = "layers.0.up_proj.weight"
    base, *models = ({name: torch.randn(12, 8, generator=g), "b": torch.randn(5, generator=g)} for _ in range(4))
    found = merge(base, models, "opcm")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
        again = merge(base, models, "opcm")
    assert all(torch.equal(found[n], again[n]) for n in found)
