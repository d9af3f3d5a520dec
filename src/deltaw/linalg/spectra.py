"""Numbers that describe a spectrum: effective and stable rank, spectral norm, angles between subspaces."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.errors import OptionError
from deltaw.linalg._checks import require_finite, require_matrix, working_dtype
from deltaw.linalg.bases import orthonormal_basis


def effective_rank(x_or_s: Tensor, *, singular_values: bool | None = None, power: float = 1.0) -> Tensor:
    """exp of the entropy of the normalised singular values: between 1 and the rank, 0 for a zero matrix.

    p_i = σ_i^power / Σ σ^power, result exp(−Σ p_i log p_i). With `power=1` this is the effective rank of Roy and
    Vetterli (EUSIPCO 2007), which RankMe (arXiv:2210.02885) takes over; `power=2` weighs by energy.

    Args:
        x_or_s: a matrix [..., m, n], or singular values: a vector [k], or [..., k] with `singular_values=True`.
        singular_values: whether `x_or_s` holds singular values; None means "if it is a vector".
        power: exponent of the singular values.

    Returns:
        [...], float32 (float64 for float64 input).
    """
    if singular_values is None:
        singular_values = x_or_s.ndim == 1
    if singular_values:
        require_finite(x_or_s, "singular values")
        s = x_or_s.to(working_dtype(x_or_s.dtype))
        if bool((s < 0).any()):
            raise OptionError(
                "singular values hold negative numbers; expected all >= 0: pass the matrix, not eigenvalues"
            )
    else:
        s = _svdvals(x_or_s)
    if s.shape[-1] == 0:
        return s.new_zeros(s.shape[:-1])
    top = s.amax(-1, keepdim=True)
    weight = (s / torch.where(top > 0, top, 1.0)) ** power
    p = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    return torch.where(top[..., 0] > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


def stable_rank(x: Tensor) -> Tensor:
    """‖X‖_F² / ‖X‖₂² of [..., m, n]: between 1 and the rank, 0 for a zero matrix."""
    s = _svdvals(x)
    if s.shape[-1] == 0:
        return s.new_zeros(s.shape[:-1])
    top = s[..., :1]
    ratio = s / torch.where(top > 0, top, 1.0)
    return ratio.square().sum(-1)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles, ascending, in radians, between the column spaces of [..., d, j] and [..., d, k] -> [..., min(j, k)].

    Small angles come from sines and large ones from cosines (Björck and Golub 1973): arccos alone loses every angle
    below the square root of rounding. Columns must be linearly independent.
    """
    require_matrix(a, "a")
    require_matrix(b, "b")
    if a.shape[-2] != b.shape[-2] or a.shape[-1] > a.shape[-2] or b.shape[-1] > b.shape[-2]:
        raise OptionError(
            f"subspaces of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected [d, j] and [d, k] with j, k <= d"
        )
    dtype = torch.promote_types(working_dtype(a.dtype), working_dtype(b.dtype))
    qa, qb = orthonormal_basis(a.to(dtype)), orthonormal_basis(b.to(dtype))
    if qa.shape[-1] < qb.shape[-1]:
        qa, qb = qb, qa
    inner = qa.mT @ qb
    cosine = torch.linalg.svdvals(inner).clamp(max=1.0)  # descending: angles ascending
    sine = torch.linalg.svdvals(qb - qa @ inner).flip(-1).clamp(max=1.0)
    return torch.where(cosine**2 > 0.5, torch.asin(sine), torch.acos(cosine))


def power_iteration(x: Tensor, steps: int = 20, generator: torch.Generator | None = None) -> Tensor:
    """A lower estimate of the spectral norm of [..., m, n] -> [...], by `steps` two-sided power steps from a random start.

    The relative gap shrinks with (σ₂/σ₁)^(4·steps) in the squared estimate; it never exceeds the norm but for rounding.
    """
    require_matrix(x)
    require_finite(x)
    if steps < 1:
        raise OptionError(f"steps={steps}; expected at least 1")
    wide = x.to(working_dtype(x.dtype))
    if wide.numel() == 0:
        return wide.new_zeros(wide.shape[:-2])
    peak = wide.abs().amax(dim=(-2, -1), keepdim=True)
    wide = wide / torch.where(peak > 0, peak, 1.0)
    if generator is None:
        generator = torch.Generator(device=x.device).manual_seed(0x5EED)
    v = torch.randn(*x.shape[:-2], x.shape[-1], 1, generator=generator, dtype=wide.dtype, device=generator.device)
    v = torch.nn.functional.normalize(v.to(x.device), dim=-2)
    for _ in range(steps):
        u = torch.nn.functional.normalize(wide @ v, dim=-2)
        v = torch.nn.functional.normalize(wide.mT @ u, dim=-2)
    return torch.linalg.vector_norm(wide @ v, dim=(-2, -1)) * peak[..., 0, 0]


def _svdvals(x: Tensor) -> Tensor:
    require_matrix(x)
    require_finite(x)
    return torch.linalg.svdvals(x.to(working_dtype(x.dtype)))
