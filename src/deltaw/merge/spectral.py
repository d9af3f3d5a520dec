"""What the spectral methods share: singular triplets in float64, and which of them are more than rounding.

All factorisations go through the smaller Gram matrix: mn² + O(n³) flops with n the smaller side, two to three times faster
than an SVD in the same precision. In float64 (an SVD for float64 input) the eigenvalues err by eps·σ₁², so a singular pair i
errs by about eps·σ₁²/(σ_i·gap_i), 1e-6 for σ_i = 1e-4 σ₁ with gaps of a hundredth of σ_i: below the error of a float32 SVD,
eps₃₂·σ₁/gap_i, wherever σ_i > 1e-7 σ₁. Leading triplets, where little depends on the weak ones, come from a float32 Gram matrix
when the spectrum says that this moves their product by less than `FLOAT32_ERROR` of its norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.linalg import gram_triplets, power_iteration, truncated_svd

#: allowed error of leading triplets, relative to the norm of their product; measured errors are a third of the estimate
FLOAT32_ERROR = 5e-5


def triplets(x: Tensor, rank: int, leading: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` strongest singular triplets of [..., m, n] in float64; `leading`: float32 may do, see above."""
    if x.dtype == torch.float64:
        return truncated_svd(x, rank, "exact")
    return gram_triplets(x, rank, FLOAT32_ERROR if leading else 0.0)


def rounding_floor(s: Tensor, base: Tensor, change: Tensor, epsilon: float, strength: float, work: float) -> Tensor:
    """Singular values of `change` that rounding alone can make: [..., 1].

    An SVD in arithmetic of spacing `work` errs by about max(m, n)·work·σ₁. A weight w stored with spacing
    epsilon·|w| errs by at most epsilon·|w|/√12 rms, and a random m x n matrix of that rms has spectral norm
    rms·(√m + √n). `strength` is the norm of the factors on the changes that were added up.
    """
    m, n = base.shape[-2:]
    # the tuned weights' magnitude, without reading them again
    rms = (base.square() + change.square()).mean((-2, -1)).sqrt()[..., None].to(s.dtype)
    stored = epsilon * rms / 12**0.5 * (m**0.5 + n**0.5) * strength
    return torch.maximum(s[..., :1] * (max(m, n) * work), stored)


def signal(
    s: Tensor, base: Tensor, change: Tensor, epsilon: float, strength: float = 1.0, projected: bool = False
) -> Tensor:
    """1 where a singular value is above rounding, 0 elsewhere: [..., r] in float64.

    `s`: of `change`, or `projected`, of a projection of it, whose rounding is still that of `change`.
    """
    work = torch.finfo(torch.float64 if change.dtype == torch.float64 else torch.float32).eps
    floor = rounding_floor(s, base, change, epsilon, strength, work)
    if projected:
        whole = power_iteration(change).to(s.dtype)[..., None] * (max(base.shape[-2:]) * work)
        floor = torch.maximum(floor, whole)
    return (s > floor).to(s.dtype)
