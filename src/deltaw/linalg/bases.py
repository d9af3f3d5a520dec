"""Orthonormal bases: of a given column space, and drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.errors import OptionError, unknown_name
from deltaw.linalg._checks import require_finite, require_matrix, working_dtype

_METHODS = ("auto", "qr", "cholesky-qr2")


def orthonormal_basis(x: Tensor, method: str = "auto") -> Tensor:
    """Q [..., m, k], k = min(m, n), with orthonormal columns whose leading ones span those of `x` [..., m, n].

    Args:
        x: [..., m, n]; computed in float32, or float64 for float64 input; returned in the dtype of `x`.
        method: `"qr"`: Householder QR. `"cholesky-qr2"`: two passes of Gram, Cholesky and triangular solve (matrix
            products only; Fukaya et al., ScalA 2014), shifted in a third pass when the
            matrix is ill-conditioned (arXiv:1809.11085), and QR when even that fails. `"auto"`: CholeskyQR2 for
            tall matrices on an accelerator, QR on the CPU.

    Either way R = Qᵀx has a non-negative diagonal, so the result is unique for full column rank and does not depend
    on the method. The columns are orthonormal to rounding for every finite input, also rank-deficient and zero.

    Raises:
        OptionError: not a matrix. NonFiniteError: NaN or infinity. UnknownNameError: no such method.
    """
    require_matrix(x)
    if method not in _METHODS:
        raise unknown_name("basis method", method, _METHODS)
    require_finite(x)
    wide = x.to(working_dtype(x.dtype))
    m, n = wide.shape[-2:]
    if method == "auto":
        method = "cholesky-qr2" if x.device.type != "cpu" and m >= 4 * n > 0 else "qr"
    if method == "cholesky-qr2" and m >= n:
        q = _cholesky_qr2(wide)
        if q is not None:
            return q.to(x.dtype)
    return _signed_qr(wide).to(x.dtype)


def random_orthonormal(
    m: int,
    n: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    batch: Sequence[int] = (),
) -> Tensor:
    """A Haar-distributed [*batch, m, n] with orthonormal columns (m >= n) or rows (m < n), on the generator's device.

    QR of a Gaussian matrix with the diagonal of R made positive; without that sign fix the distribution is not Haar
    (Mezzadri, math-ph/0609050). Drawn in float32 (float64 on request), so half precision gets the rounded frame.
    """
    if m < 1 or n < 1:
        raise OptionError(f"m={m}, n={n}; expected positive sizes")
    device = "cpu" if generator is None else generator.device
    tall, thin = max(m, n), min(m, n)
    gaussian = torch.randn(*batch, tall, thin, generator=generator, dtype=working_dtype(dtype), device=device)
    q = _signed_qr(gaussian)
    return (q if m >= n else q.mT).to(dtype)


def _signed_qr(x: Tensor) -> Tensor:
    q, r = torch.linalg.qr(x)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype)[..., None, :]


def _cholesky_qr2(x: Tensor) -> Tensor | None:
    """CholeskyQR2, with a shifted first pass on breakdown; None when it cannot reach orthonormality."""
    m, n = x.shape[-2:]
    eps = torch.finfo(x.dtype).eps
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    if not bool(((norms > 1e-15) & (norms < 1e15)).all()):
        return None  # zero, or squares out of range
    x = x / norms
    gram = x.mT @ x
    factor, info = torch.linalg.cholesky_ex(gram, upper=True)
    passes = 1
    if bool((info != 0).any()):
        shift = 11 * (m * n + n * (n + 1)) * eps  # times ‖X‖₂² <= 1
        factor, info = torch.linalg.cholesky_ex(gram + shift * torch.eye(n, dtype=x.dtype, device=x.device), upper=True)
        if bool((info != 0).any()):
            return None
        passes = 2
    q = torch.linalg.solve_triangular(factor, x, upper=True, left=False)
    for _ in range(passes):
        factor, info = torch.linalg.cholesky_ex(q.mT @ q, upper=True)
        if bool((info != 0).any()):
            return None
        q = torch.linalg.solve_triangular(factor, q, upper=True, left=False)
    defect = (q.mT @ q - torch.eye(n, dtype=x.dtype, device=x.device)).abs().amax()
    return q if bool(defect <= 20 * eps * n**0.5 + 4 * eps) else None
