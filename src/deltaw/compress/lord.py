"""LORD: principal components of a layer's outputs (Kaushal, Vaidhya and Rish, arXiv:2309.14021, section 3).

With y = W x + b on the calibration tokens, μ = E[y], C = Cov(y) and E_r [m, r] its leading eigenvectors, the outputs
are replaced by their projection ("atomic feature mimicking")

    ŷ = E_r E_rᵀ (y − μ) + μ,    so   L = E_r [m, r],  R = E_rᵀ W [r, n],  bias = E_r E_rᵀ b + (I − E_r E_rᵀ) μ.

E‖y − ŷ‖² per token is the sum of the dropped eigenvalues of C, the mean of the outputs is kept at every rank, and
r = m is exact. With `centred=False` the second moment E[y yᵀ] is taken and μ = 0; without a bias that is svd-llm.
The second bias is a single vector, so a layer without one gains m parameters (counted in the budget).
Cost: the m x m moment of the outputs and one eigendecomposition of the smaller side; no inverse anywhere.
"""

from __future__ import annotations

import torch

from deltaw.catalogue import method
from deltaw.compress.base import Compressor, Decomposition, Factors, Layer, principal_outputs


@method(
    "lord",
    family="compress",
    paper="arXiv:2309.14021",
    title="LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression",
    summary="projection of each layer's outputs on their principal components over calibration data, mean kept",
    cost={"params": "r*(m+n)", "extra_bias": "m"},
    aliases=("afm",),
    tags={"low-rank", "data-aware", "pca"},
)
class LORD(Compressor):
    """Output PCA; `centred` subtracts the mean output first (the paper's form)."""

    needs = frozenset({"output_cov", "output_mean"})

    def __init__(self, centred: bool = True):
        self.centred = centred
        self.adds_bias = centred

    def decompose(self, layer: Layer) -> Decomposition:
        cov = layer.stat("output_cov", centred=self.centred)
        m, n = layer.weight.shape
        if m <= n + 1:
            return principal_outputs(layer.weight, cov)
        # The outputs lie in the span of W's columns and, where no mean is taken off, of the bias.
        span = [layer.weight] if self.centred or layer.bias is None else [layer.weight, layer.bias[:, None]]
        basis = torch.linalg.qr(torch.cat(span, 1))[0]
        return principal_outputs(layer.weight, basis.mT @ cov @ basis, basis)

    def factors(self, layer: Layer, decomposition: Decomposition, rank: int) -> Factors:
        left, right = decomposition.left[:, :rank], decomposition.right[:rank]
        bias = layer.bias
        mean = layer.stat("output_mean") if self.centred else None
        if mean is not None:
            kept = mean if bias is None else mean - bias
            bias = mean - left @ (left.mT @ kept)
        elif bias is not None:
            bias = left @ (left.mT @ bias)
        return Factors(left, right, bias)
