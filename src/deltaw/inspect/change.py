"""Numbers about the change of one matrix: what ΔW = W' − W₀ is like, and where it lies relative to W₀."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.inspect.intruder import check_options, compare
from deltaw.linalg import effective_rank, truncated_svd


class BaseSVD(NamedTuple):
    """Thin SVD of a base matrix, kept so that several tuned models can be compared with it."""

    u: Tensor  #: [m, q]
    s: Tensor  #: [q]
    vh: Tensor  #: [q, n]

    @classmethod
    def of(cls, base: Tensor) -> BaseSVD:
        """In float64."""
        return cls(*truncated_svd(base.double(), min(base.shape[-2:]), "exact"))


def change(
    base: Tensor,
    tuned: Tensor,
    top_k: int = 10,
    epsilon: float = 0.5,
    degeneracy: float = 0.0,
    svd: BaseSVD | None = None,
) -> dict[str, Any]:
    """Diagnostics of one matrix [m, n], as plain numbers. With σ the singular values of ΔW:

    - `relative_norm` ‖ΔW‖_F / ‖W₀‖_F; `norm`, `base_norm`; spectral norms `spectral`, `base_spectral`, `tuned_spectral`;
    - `effective_rank` exp(entropy of σ / Σσ), `stable_rank` ‖ΔW‖_F² / σ₁²; 0 where nothing changed;
    - `share_left`, `share_right`, `share_both`: part of ‖ΔW‖_F² inside the leading `top_k` left, right, or left and right
      singular subspaces of W₀ (a random ΔW has k/m, k/n, k²/mn); None where nothing changed;
    - `intruders` and `cosines` [k] of the leading left singular vectors of W' (see `intruder`);
    - `singular_values` of ΔW, `base_singular_values`.
    """
    check_options(base, tuned, top_k, epsilon, degeneracy)
    base, tuned = base.double(), tuned.double()
    svd = svd or BaseSVD.of(base)
    delta = tuned - base
    s = torch.linalg.svdvals(delta)
    norm, base_norm = float(torch.linalg.vector_norm(s)), float(torch.linalg.vector_norm(svd.s))
    k = min(top_k, *base.shape)
    left, right = svd.u[:, :k].mT @ delta, delta @ svd.vh[:k].mT
    found = compare(svd.u, svd.s, tuned, top_k, epsilon, degeneracy)

    def share(part: Tensor) -> float | None:
        return float(part.square().sum()) / norm**2 if norm > 0 else None

    return {
        "norm": norm,
        "base_norm": base_norm,
        "relative_norm": norm / base_norm if base_norm > 0 else None,
        "spectral": float(s[0]),
        "base_spectral": float(svd.s[0]),
        "tuned_spectral": float(found.singular_values[0]),
        "effective_rank": float(effective_rank(s)),
        "stable_rank": (norm / float(s[0])) ** 2 if norm > 0 else 0.0,
        "share_left": share(left),
        "share_right": share(right),
        "share_both": share(left @ svd.vh[:k].mT),
        "intruders": int(found.number),
        "cosines": found.cosines.tolist(),
        "singular_values": s.tolist(),
        "base_singular_values": svd.s.tolist(),
    }
