"""The polar factor, and other functions of the singular values, through the smaller Gram matrix instead of an SVD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deltaw.linalg._checks import require_finite, require_matrix
from deltaw.linalg._symmetric import symmetric_product


def gram_polar(x: Tensor, floor: float = 1e-6) -> Tensor:
    """X (XᵀX)^(−½) = U Vᵀ of [..., m, n] in float64, by an eigendecomposition of the smaller Gram matrix.

    Singular values below `floor` times the largest count as zero: their directions are left out, where an SVD would
    complete the frame by arbitrary ones. The eigenvalues err by eps·σ₁², so a kept singular value comes out at 1 up
    to eps/(2 floor²) = 1e-4 at the default floor; one Newton-Schulz step, taken where it is needed, squares that to less than 1e-7.

    Raises:
        OptionError: not a matrix.
        NonFiniteError: NaN or infinite entries.
    """
    tall, values, vectors = _gram_spectrum(x)
    kept = values > floor**2 * values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    scale = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
    out = tall @ symmetric_product(vectors * scale[..., None, :], vectors.mT)
    if bool((kept & (values < 1e-7 * values[..., -1:])).any()):  # elsewhere the error is below 1e-9 as it is
        out = 1.5 * out - 0.5 * out @ symmetric_product(out.mT, out)
    return out if tall.shape == x.shape else out.mT


def spectral_function(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """U f(S) Vᵀ of [..., m, n] in float64, where `function` maps all singular values [..., q], largest first, at once.

    One eigendecomposition of the smaller Gram matrix gives V and S, and X V f(S)/S Vᵀ never forms U. An eigenvalue errs by
    eps·σ₁², so the direction of σ_i counts with an error of eps·σ₁²/(2σ_i²), 1e-8 at σ_i = 1e-4 σ₁: let f be 0 below 1e-6 σ₁.

    Raises:
        OptionError: not a matrix.
        NonFiniteError: NaN or infinite entries.
    """
    tall, values, vectors = _gram_spectrum(x)
    s = values.clamp_min(0).sqrt().flip(-1)
    wanted = function(s)
    ratio = torch.where(s > 0, wanted / torch.where(s > 0, s, 1.0), 0.0).flip(-1)
    out = tall @ symmetric_product(vectors * ratio[..., None, :], vectors.mT)
    return out if tall.shape == x.shape else out.mT


def _gram_spectrum(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x or xᵀ with its shorter side last, in float64, and the eigenvalues (ascending) and vectors of its Gram matrix."""
    require_matrix(x)
    require_finite(x)
    m, n = x.shape[-2:]
    tall = x.double() if m >= n else x.double().mT
    values, vectors = torch.linalg.eigh(symmetric_product(tall.mT, tall))
    return tall, values, vectors
