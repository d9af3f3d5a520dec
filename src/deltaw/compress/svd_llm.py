"""SVD-LLM: truncation-aware data whitening (Wang, Zheng, Wan and Zhang, arXiv:2403.07378, sections 3.1 and 3.2).

With H = E[x xᵀ] over the calibration tokens and any root H = C Cᵀ, the squared output error is

    E‖W x − L R x‖² = ‖(W − L R) C‖_F² = Σ_{i>r} σ_i(W C)²,   least for   L R = U_r Σ_r V_rᵀ C⁻¹,   W C = U Σ Vᵀ,

so dropping σ_i costs exactly σ_i. As U_r Σ_r V_rᵀ C⁻¹ = U_r U_rᵀ W, the factors are taken as L = U_r [m, r] and
R = U_rᵀ W [r, n], and U from the eigenvectors of W H Wᵀ: no root and no inverse, hence nothing to fail on a
rank-deficient H (the paper adds jitter until Cholesky passes). Directions that no calibration token excites are
ordered by the weight alone, through `damping`.

`local_update=True` is the paper's second step: block after block, with the inputs x̃ of the model whose earlier layers
are compressed already, L is fitted again to W x̃ by least squares, L* = W H̃ Rᵀ (R H̃ Rᵀ)⁻¹.
Cost: H is n x n per distinct input; one eigendecomposition of the smaller side.
"""

from __future__ import annotations

import torch

from deltaw.catalogue import method
from deltaw.compress.base import Compressor, Decomposition, Factors, Layer, principal_outputs
from deltaw.errors import OptionError


@method(
    "svd-llm",
    family="compress",
    paper="arXiv:2403.07378",
    title="SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    summary="SVD of the weight times the root of its input covariance: least output error on the calibration data",
    cost={"params": "r*(m+n)"},
    tags={"low-rank", "data-aware", "whitening"},
)
class SVDLLM(Compressor):
    """Whitened truncated SVD.

    Args:
        local_update: fit the left factors again on the partly compressed model (one pass over the data per block).
        damping: part of the mean diagonal of H that is added to its diagonal.
    """

    needs = frozenset({"input_cov"})

    def __init__(self, local_update: bool = False, damping: float = 1e-8):
        if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < float("inf"):
            raise OptionError(f"damping={damping!r}; expected 0 or a small positive number such as 1e-8")
        self.damping = damping
        self.refit_needs = self.needs if local_update else frozenset()

    def decompose(self, layer: Layer) -> Decomposition:
        gram = layer.stat("input_cov")
        gram.diagonal().add_(self.damping * gram.diagonal().mean())
        basis, inner = None, layer.weight
        if layer.weight.shape[0] > layer.weight.shape[1]:  # the outputs fill n of m dimensions
            basis, inner = torch.linalg.qr(layer.weight)
        return principal_outputs(layer.weight, inner @ gram @ inner.mT, basis)

    def refit(self, layer: Layer, factors: Factors) -> Factors:
        gram = layer.stat("input_cov")
        # As a correction of L, so that directions the data does not reach keep what they had.
        cross = (layer.weight - factors.dense()) @ gram @ factors.right.mT
        inner = factors.right @ gram @ factors.right.mT
        rtol = inner.shape[-1] * torch.finfo(torch.float32).eps  # the moments were accumulated in float32
        return Factors(
            factors.left + cross @ torch.linalg.pinv(inner, rtol=rtol, hermitian=True), factors.right, factors.bias
        )
