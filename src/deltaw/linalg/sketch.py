"""Random sketches S [d, n] with E[SᵀS] = I, and leverage scores."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.errors import OptionError
from deltaw.linalg._checks import require_finite, require_matrix


def gaussian_sketch(
    d: int, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A dense sketch [d, n] of independent N(0, 1/d) entries, on the generator's device."""
    _positive(d, n)
    device = "cpu" if generator is None else generator.device
    return torch.randn(d, n, generator=generator, dtype=dtype, device=device) / d**0.5


def sparse_sign_sketch(
    d: int,
    n: int,
    nnz: int = 8,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    sparse: bool = False,
) -> Tensor:
    """A sketch [d, n] with exactly `nnz` entries ±1/√nnz in each column (OSNAP, arXiv:1211.1002); nnz=1 is CountSketch.

    The d rows are cut into `nnz` blocks and each column hits every block once, which keeps the rows of a column distinct.
    `sparse=True` returns a coalesced COO tensor, whose product with a matrix costs nnz·n per column.
    """
    _positive(d, n)
    if not 1 <= nnz <= d:
        raise OptionError(f"nnz={nnz}; expected 1 … d={d} non-zeros a column")
    device = "cpu" if generator is None else generator.device
    edges = torch.arange(nnz + 1, device=device) * d // nnz
    width = (edges[1:] - edges[:-1])[:, None]
    draw = torch.rand(nnz, n, generator=generator, dtype=torch.float64, device=device)
    rows = edges[:-1, None] + torch.minimum((draw * width).long(), width - 1)
    signs = torch.randint(0, 2, (nnz, n), generator=generator, device=device).to(dtype) * 2 - 1
    values = signs / nnz**0.5
    if sparse:
        columns = torch.arange(n, device=device).expand(nnz, n)
        return torch.sparse_coo_tensor(
            torch.stack((rows.flatten(), columns.flatten())), values.flatten(), (d, n), check_invariants=False
        ).coalesce()
    return torch.zeros(d, n, dtype=dtype, device=device).scatter_(0, rows, values)


def leverage_scores(a: Tensor) -> Tensor:
    """τ_i = ‖e_iᵀU‖² of [..., m, n] -> [..., m], U an orthonormal basis of the column space: in [0, 1], summing to the rank.

    By SVD in float64; singular values at or below max(m, n)·eps·σ₁ (eps of the dtype of `a`) count as zero.
    """
    require_matrix(a, "a")
    require_finite(a, "a")
    u, s, _ = torch.linalg.svd(a.double(), full_matrices=False)
    if s.shape[-1] == 0:
        return torch.zeros(a.shape[:-1], dtype=a.dtype, device=a.device)
    kept = s > max(a.shape[-2:]) * torch.finfo(a.dtype).eps * s[..., :1]
    return (u.square() * kept[..., None, :]).sum(-1).to(a.dtype)


def _positive(d: int, n: int) -> None:
    if d < 1 or n < 1:
        raise OptionError(f"sketch of shape [{d}, {n}]; expected positive sizes")
