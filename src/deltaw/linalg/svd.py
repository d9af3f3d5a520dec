"""Leading singular triplets, exact or randomised, with signs that do not depend on the routine."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.errors import unknown_name
from deltaw.linalg._checks import require_finite, require_matrix, require_rank, working_dtype
from deltaw.linalg._symmetric import symmetric_product

Triplets = tuple[Tensor, Tensor, Tensor]
_METHODS = ("auto", "exact", "gram", "randomized")


def truncated_svd(a: Tensor, rank: int, method: str = "auto", generator: torch.Generator | None = None) -> Triplets:
    """The leading singular triplets of `a` [..., m, n]: U [..., m, r], S [..., r] descending, Vh [..., r, n].

    Args:
        a: any floating dtype; half precision is computed and returned in float32.
        rank: r, 1 … min(m, n).
        method: `"exact"`: LAPACK gesdd. `"gram"`: eigenvectors of the smaller Gram matrix in float64, then one QR for
            the other side (for float32 input as accurate as gesdd in float32; for float64 input absolute errors are
            1e-8 σ₁). `"randomized"`: see `randomized_svd`, four power iterations. `"auto"`: randomised where rank is
            at most an eighth of a side of 1024 or more; Gram where the input is not float64 and one side is at least
            twice the other; exact otherwise.
        generator: for the randomised method; None seeds a fixed stream, so that equal input gives equal output.

    Signs: the entry of largest magnitude of each left vector is positive.

    Raises:
        OptionError: not a matrix, or a rank that does not fit.
        NonFiniteError: NaN or infinite entries.
        UnknownNameError: no such method.
    """
    require_matrix(a, "a")
    require_rank(rank, a.shape)
    if method not in _METHODS:
        raise unknown_name("SVD method", method, _METHODS)
    require_finite(a, "a")
    short, long = sorted(a.shape[-2:])
    if method == "auto":
        if short >= 1024 and 8 * rank <= short:
            method = "randomized"
        elif a.dtype != torch.float64 and long >= 2 * short:
            method = "gram"
        else:
            method = "exact"
    if method == "randomized":
        return randomized_svd(a, rank, power_iterations=4, generator=generator)
    if method == "gram":
        return _gram_svd(a, rank)
    u, s, vh = torch.linalg.svd(a.to(working_dtype(a.dtype)), full_matrices=False)
    return fix_signs(u[..., :rank], s[..., :rank], vh[..., :rank, :])


def randomized_svd(
    a: Tensor, rank: int, oversample: int = 10, power_iterations: int = 2, generator: torch.Generator | None = None
) -> Triplets:
    """Randomised truncated SVD of [..., m, n] (Halko, Martinsson, Tropp, arXiv:0909.4061, Algorithms 4.4 and 5.1).

    A Gaussian sketch of rank + oversample columns, `power_iterations` rounds of A Aᵀ with a QR after every half round
    (without it, singular values below eps^(1/(2q+1)) σ₁ are lost), then the SVD of the small QᵀA. Costs
    2mn(rank + oversample)(2 power_iterations + 2) flops. Exact for rank(A) <= rank; otherwise, without power
    iterations, E‖A − QQᵀA‖_F <= (1 + r/(p − 1))^½ times the optimal error, and close to optimal with two.

    Returns U, S, Vh as `truncated_svd`; the same errors.
    """
    require_matrix(a, "a")
    require_rank(rank, a.shape)
    require_finite(a, "a")
    wide = a.to(working_dtype(a.dtype))
    m, n = wide.shape[-2:]
    flip = m < n
    tall = wide.mT if flip else wide
    columns = min(rank + max(oversample, 0), m, n)
    if generator is None:
        generator = torch.Generator(device=a.device).manual_seed(0x5EED)
    sketch = torch.randn(min(m, n), columns, generator=generator, dtype=wide.dtype, device=generator.device)
    q = torch.linalg.qr(tall @ sketch.to(a.device))[0]
    for _ in range(power_iterations):
        q = torch.linalg.qr(tall.mT @ q)[0]
        q = torch.linalg.qr(tall @ q)[0]
    u, s, vh = torch.linalg.svd(q.mT @ tall, full_matrices=False)
    u = q @ u
    u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
    return fix_signs(vh.mT, s, u.mT) if flip else fix_signs(u, s, vh)


def fix_signs(u: Tensor, s: Tensor, vh: Tensor) -> Triplets:
    """Flip singular pairs so that the entry of largest magnitude of each left vector is positive."""
    at = u.abs().argmax(dim=-2, keepdim=True)
    sign = torch.where(u.gather(-2, at) < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, vh * sign.mT


def gram_triplets(a: Tensor, rank: int, tolerance: float = 0.0) -> Triplets:
    """The leading singular triplets of [..., m, n] in float64, by the smaller Gram matrix and with no rule for signs.

    Two to three times faster than an SVD in the same precision. float64 input goes through float64, where eigenvalues err by
    eps·σ₁², so that a pair i errs by about eps·σ₁²/(σ_i·gap_i); other input through float32 if that lets U diag(S) Vh err by no
    more than `tolerance` of its norm, by an estimate from the spectrum. Columns of U are A v_i/σ_i, or, where a wanted σ_i is
    below 1e-5 σ₁, those of a QR, which are orthonormal for zeros too.

    Returns U, S, Vh as `truncated_svd`; the same errors.
    """
    require_matrix(a, "a")
    require_rank(rank, a.shape)
    require_finite(a, "a")
    m, n = a.shape[-2:]
    # scale first, by a power of two as that rounds nothing: squares of tiny or huge entries would leave the range
    wide = a.to(working_dtype(a.dtype))
    exponent = torch.frexp(wide.abs().amax(dim=(-2, -1), keepdim=True))[1] - 1
    peak = torch.ldexp(torch.ones_like(exponent, dtype=wide.dtype), exponent)
    tall = (wide / peak) if m >= n else (wide / peak).mT
    peak = peak[..., 0].double()
    if tolerance and a.dtype != torch.float64:
        values, vectors = torch.linalg.eigh(symmetric_product(tall.mT, tall))
        if bool((_float32_error(values, rank) <= tolerance).all()):
            return _oriented(*_divided(tall, vectors.flip(-1)[..., :rank]), peak, m >= n)
    tall = tall.double()
    values, vectors = torch.linalg.eigh(symmetric_product(tall.mT, tall))
    wanted = vectors.flip(-1)[..., :rank]
    sound = bool((values[..., -rank] > 1e-10 * values[..., -1]).all())
    return _oriented(*(_divided if sound else _by_qr)(tall, wanted), peak, m >= n)


def _float32_error(values: Tensor, rank: int) -> Tensor:
    """Estimated error of U diag(S) Vh relative to its norm when eigenvalues [..., n], ascending, come from float32: [...].

    The Gram matrix is off by E with entries of about ε = 4·eps·λ₁/√n in its eigenbasis. That turns v_i towards v_j by
    ε/(λ_i − λ_j): across the border of the wanted set the product changes by (σ_i² + σ_j²)^½ of it, and inside u_i = A v_i/σ_i
    and u_j stop being orthogonal by ε/(σ_i σ_j).
    """
    wide = values.double().flip(-1).clamp_min(0)
    top, rest = wide[..., :rank], wide[..., rank:]
    noise = (4 * torch.finfo(torch.float32).eps * top[..., 0]).square() / values.shape[-1]
    gaps = (top[..., :, None] - rest[..., None, :]).square().clamp_min(torch.finfo(torch.float64).tiny)
    across = ((top[..., :, None] + rest[..., None, :]) / gaps).sum((-2, -1))
    inside = rank * (1 / top.clamp_min(torch.finfo(torch.float64).tiny)).sum(-1)
    error = (noise * (across + inside) / top.sum(-1).clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return torch.where(top[..., -1] > 1e-5 * top[..., 0], error, float("inf"))  # zero matrices too


def _divided(tall: Tensor, vectors: Tensor) -> Triplets:
    """A v_i/σ_i, σ_i and V."""
    u = tall @ vectors
    s = torch.linalg.vector_norm(u, dim=-2)
    return u / s[..., None, :], s, vectors


def _by_qr(tall: Tensor, vectors: Tensor) -> Triplets:
    """The same by a QR: A V has nearly orthogonal columns of length σ, and it gives sound vectors where σ is zero too."""
    u, r = torch.linalg.qr(tall @ vectors)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    s, order = diagonal.abs().sort(dim=-1, descending=True, stable=True)
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(u.dtype)[..., None, :]
    u = (u * sign).gather(-1, order[..., None, :].expand_as(u))
    return u, s, vectors.gather(-1, order[..., None, :].expand_as(vectors))


def _oriented(u: Tensor, s: Tensor, v: Tensor, peak: Tensor, upright: bool) -> Triplets:
    """In float64, with the scale and the orientation of the input."""
    u, s, v = u.double(), s.double() * peak, v.double()
    return (u, s, v.mT) if upright else (v, s, u.mT)


def _gram_svd(a: Tensor, rank: int) -> Triplets:
    """Through float64 alone and by a QR, so that all vectors are orthonormal to rounding."""
    wide = a.double()
    m, n = wide.shape[-2:]
    tall = wide if m >= n else wide.mT
    peak = tall.abs().amax(dim=(-2, -1), keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    tall = tall / peak
    vectors = torch.linalg.eigh(symmetric_product(tall.mT, tall))[1].flip(-1)[..., :rank]
    found = _oriented(*_by_qr(tall, vectors), peak[..., 0], m >= n)
    return fix_signs(*(t.to(working_dtype(a.dtype)) for t in found))
