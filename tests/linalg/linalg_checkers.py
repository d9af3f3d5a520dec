"""Matrices with prescribed spectra, and the checks that say whether a result is a polar factor."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from deltaw.linalg import random_orthonormal, seeded_generator

SPECTRA = ("flat", "1/k", "1/k²", "ill-conditioned", "rank-deficient", "zero", "gaussian")
#: largest |σ − 1| that `method="auto"` may leave for σ >= 1e-2 of the Frobenius norm, by the dtype asked for
POLAR_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.08}

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
spectra = st.sampled_from(SPECTRA)
seeds = st.integers(0, 2**16)


def matrix(m: int, n: int, spectrum: str = "gaussian", seed: int = 0, scale: float = 1.0) -> Tensor:
    """A float64 matrix [m, n] with the named spectrum between Haar frames."""
    generator = seeded_generator(seed, spectrum, m, n)
    if spectrum == "gaussian":
        return scale * torch.randn(m, n, generator=generator, dtype=torch.float64)
    q = min(m, n)
    k = torch.arange(1, q + 1, dtype=torch.float64)
    values = {
        "flat": torch.ones(q, dtype=torch.float64),
        "1/k": 1 / k,
        "1/k²": k**-2,
        "ill-conditioned": torch.logspace(0, -12, q, dtype=torch.float64),
        "rank-deficient": (k <= (q + 1) // 2).double(),
        "zero": torch.zeros(q, dtype=torch.float64),
    }[spectrum]
    u = random_orthonormal(m, q, generator, torch.float64)
    return scale * (u * values) @ random_orthonormal(n, q, generator, torch.float64).mT


def check_polar(x: Tensor, out: Tensor, tolerance: float, threshold: float = 1e-2) -> None:
    """`out` is the polar factor of `x` on every singular pair with σ >= threshold·‖X‖_F, and a contraction elsewhere.

    `x` is the float64 matrix that was orthogonalized; singular pairs come from LAPACK in float64.
    """
    assert out.shape == x.shape
    assert bool(torch.isfinite(out).all()), "finite input gave a non-finite result"
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    inner = u.mT @ out.double() @ vh.mT
    large = s >= threshold * s.norm()
    if not bool(s.any()):
        assert not bool(out.any()), "zero must give zero"
        return
    gains = inner.diagonal()[large]
    assert float((gains - 1).abs().max()) <= tolerance, f"singular values end at {gains.min():.4f} … {gains.max():.4f}"
    off = inner - torch.diag(inner.diagonal())
    assert float(off[large][:, large].abs().max()) <= tolerance, "the result mixes singular pairs"
    assert float(torch.linalg.matrix_norm(out.double(), 2)) <= 1 + 2 * tolerance + 1e-3, "a singular value exceeds one"


def check_orthonormal(q: Tensor, tolerance: float) -> None:
    """Columns of [..., m, k] are orthonormal."""
    defect = (q.double().mT @ q.double() - torch.eye(q.shape[-1], dtype=torch.float64)).abs()
    assert defect.numel() == 0 or float(defect.max()) <= tolerance
