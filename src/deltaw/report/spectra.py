"""Medians and counts over the spectra of ΔW: {method: {domain: {matrix: {"singular_values", …}}}}."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaw.errors import DataError

Spectra = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")
#: below this share of the largest singular value a direction is drawn as absent (float32 rounding of ΔW)
FLOOR = 1e-4


@dataclass(frozen=True)
class Change:
    """One row of the inspection: how far and how richly a method moved the matrices of one domain."""

    method: str
    domain: str
    matrices: int
    effective_rank: float
    stable_rank: float
    relative_norm: float
    intruders: int


def check_spectra(spectra: Spectra) -> None:
    """Raise DataError naming the first matrix whose record cannot be used."""
    for method, domain, name, record in each(spectra):
        values = record.get("singular_values")
        if values is None or len(values) == 0 or not np.isfinite(np.asarray(values, dtype=float)).all():
            raise DataError(
                f"spectra of {method}/{domain}/{name}: expected a list of finite singular values, found {values!r:.60}"
            )


def each(spectra: Spectra) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """(method, domain, matrix name, record), in the order given."""
    for method, domains in spectra.items():
        for domain, matrices in domains.items():
            for name, record in matrices.items():
                yield method, domain, name, record


def _stable_rank(record: Mapping[str, Any]) -> float:
    if "stable_rank" in record:
        return float(record["stable_rank"])
    s = np.asarray(record["singular_values"], dtype=float)
    return float((s**2).sum() / s.max() ** 2) if s.max() > 0 else 0.0


def changes(spectra: Spectra) -> list[Change]:
    """One `Change` per method and domain: medians over matrices, intruders summed."""
    rows = []
    for method, domains in spectra.items():
        for domain, matrices in domains.items():
            records = list(matrices.values())
            if not records:
                continue
            rows.append(
                Change(
                    method,
                    domain,
                    len(records),
                    float(np.median([r.get("effective_rank", 0.0) for r in records])),
                    float(np.median([_stable_rank(r) for r in records])),
                    float(np.median([r.get("relative_norm", 0.0) for r in records])),
                    int(sum(r.get("intruders", 0) for r in records)),
                )
            )
    return rows


def per_method(spectra: Spectra, value: Callable[[Change], float]) -> dict[str, float]:
    """The mean over domains of `value(change)` for every method."""
    found: dict[str, list[float]] = {}
    for c in changes(spectra):
        found.setdefault(c.method, []).append(value(c))
    return {m: sum(v) / len(v) for m, v in found.items()}


def curve(spectra: Spectra, method: str) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """(index from 1, median, 10th and 90th percentile) of σ_i / σ_1 over all matrices of a method.

    Shorter spectra count as zero beyond their end; the curve stops where the median falls under FLOOR.
    """
    rows = [np.asarray(r["singular_values"], dtype=float) for m, _, _, r in each(spectra) if m == method]
    rows = [np.sort(s)[::-1] / s.max() for s in rows if s.max() > 0]
    if not rows:
        empty = np.zeros(0)
        return empty, empty, empty, empty
    width = max(len(s) for s in rows)
    padded = np.stack([np.pad(s, (0, width - len(s))) for s in rows])
    low, middle, high = np.quantile(padded, [0.1, 0.5, 0.9], axis=0)
    keep = int((middle >= FLOOR).sum())
    return np.arange(1, keep + 1), middle[:keep], np.maximum(low[:keep], FLOOR), high[:keep]


def layer_of(name: str) -> int | None:
    """The layer number in a matrix name ("encoder.layer.3.attention…" → 3), or None."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def by_layer(spectra: Spectra, method: str, key: str = "effective_rank") -> dict[int, tuple[float, float, float]]:
    """{layer: (median, 10th, 90th percentile)} of a record's number over matrices and domains."""
    found: dict[int, list[float]] = {}
    for m, _, name, record in each(spectra):
        layer = layer_of(name)
        if m == method and layer is not None and key in record:
            found.setdefault(layer, []).append(float(record[key]))
    return {k: tuple(float(x) for x in np.quantile(v, [0.5, 0.1, 0.9])) for k, v in sorted(found.items())}  # type: ignore[misc]
