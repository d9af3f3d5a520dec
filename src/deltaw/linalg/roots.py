"""Roots of positive semi-definite (Gram) matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.errors import OptionError, unknown_name
from deltaw.linalg._checks import require_finite, require_square, working_dtype


def psd_root(gram: Tensor, *, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """G^{1/2} and the pseudo-inverse root G^{+1/2} of symmetric PSD [..., n, n], by eigendecomposition in float64.

    Eigenvalues λ <= n·eps·λ_max count as zero in both (rounding leaves an accumulated Gram matrix slightly indefinite),
    so root @ inverse_root is the projector on the kept range. `eps` defaults to that of the dtype of `gram`.
    Returned in the dtype of `gram` (half precision: float32).
    """
    values, vectors = _eigh(gram, eps)
    root = values.sqrt()
    inverse = torch.where(values > 0, 1.0 / root.clamp_min(1e-300), 0.0)
    dtype = working_dtype(gram.dtype)
    return tuple(((vectors * d[..., None, :]) @ vectors.mT).to(dtype) for d in (root, inverse))  # type: ignore[return-value]


def inverse_root(
    gram: Tensor, p: int, *, damping: float = 0.0, method: str = "eigh", eps: float | None = None, steps: int = 30
) -> Tensor:
    """(G + damping·I)^{−1/p} of symmetric PSD [..., n, n], p >= 1, in the dtype of `gram`.

    Args:
        gram: symmetric PSD.
        p: the root; 2 whitens, 4 is Shampoo's.
        damping: added to the diagonal, absolute.
        method: `"eigh"`: eigendecomposition in float64; eigenvalues λ <= n·eps·λ_max get the pseudo-inverse.
            `"newton"`: the coupled Newton iteration (Guo and Higham 2006; Anil et al., arXiv:2002.09018), matrix
            products only, in float32 or float64; needs a definite matrix, so give it damping.
        eps: see method; default that of the dtype.
        steps: most iterations of `"newton"`.
    """
    if not isinstance(p, int) or p < 1:
        raise OptionError(f"p={p!r}; expected a whole number of at least 1")
    if method not in ("eigh", "newton"):
        raise unknown_name("inverse root method", method, ("eigh", "newton"))
    require_square(gram, "gram")
    if damping:
        gram = gram + damping * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    if method == "newton":
        return _coupled_newton(gram, p, steps)
    values, vectors = _eigh(gram, eps)
    inverse = torch.where(values > 0, values.clamp_min(1e-300) ** (-1.0 / p), 0.0)
    return ((vectors * inverse[..., None, :]) @ vectors.mT).to(gram.dtype)


def _eigh(gram: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """Eigenpairs in float64, with everything at or below n·eps·λ_max set to exactly zero."""
    require_square(gram, "gram")
    require_finite(gram, "gram")
    wide = gram.double()
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    if gram.shape[-1] == 0:
        return values, vectors
    eps = torch.finfo(gram.dtype).eps if eps is None else eps
    floor = (gram.shape[-1] * eps * values[..., -1:]).clamp_min(0.0)
    return torch.where(values > floor, values, 0.0), vectors


def _coupled_newton(gram: Tensor, p: int, steps: int) -> Tensor:
    """X → G^{−1/p}, M → I with T = ((p+1)I − M)/p, X ← XT, M ← TᵖM, from M = zG, X = z^{1/p} I."""
    require_finite(gram, "gram")
    wide = gram.to(working_dtype(gram.dtype))
    identity = torch.eye(gram.shape[-1], dtype=wide.dtype, device=gram.device)
    norm = torch.linalg.matrix_norm(wide, keepdim=True)  # Frobenius: an upper bound of λ_max
    scale = (1 + p) / (2 * torch.where(norm > 0, norm, 1.0))
    x = identity * scale ** (1.0 / p)
    m = wide * scale
    error = (m - identity).abs().amax()
    for _ in range(steps):
        t = ((p + 1) * identity - m) / p
        new_x, new_m = x @ t, torch.linalg.matrix_power(t, p) @ m
        new_error = (new_m - identity).abs().amax()
        # stop at the rounding floor; past it the coupled pair drifts apart
        if not bool(new_error < error) and bool(error < 0.1):
            break
        x, m, error = new_x, new_m, new_error
    return x.to(gram.dtype)
