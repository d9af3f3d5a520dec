"""Truncated SVD: the best rank-r approximation of the weight alone (Eckart and Young, 1936).

    W = U Σ Vᵀ,  L = U_r √Σ_r [m, r],  R = √Σ_r V_rᵀ [r, n];  error² = ‖W − L R‖_F² = Σ_{i>r} σ_i²

Needs no data and is the baseline that data-aware methods must beat. Cost: one SVD, O(m n min(m, n)).
"""

from __future__ import annotations

from deltaw.catalogue import method
from deltaw.compress.base import Compressor, Decomposition, Layer
from deltaw.linalg import weighted_svd


@method(
    "svd",
    family="compress",
    paper="doi:10.1007/BF02288367",
    title="Truncated SVD (Eckart and Young, The approximation of one matrix by another of lower rank)",
    summary="best rank-r approximation of each weight in the Frobenius norm; needs no data",
    cost={"params": "r*(m+n)"},
    aliases=("truncated-svd",),
    peers={"scikit-learn": "TruncatedSVD", "torch": "svd_lowrank"},
    tags={"low-rank", "data-free"},
)
class SVD(Compressor):
    """Truncated SVD of the weight."""

    def decompose(self, layer: Layer) -> Decomposition:
        found = weighted_svd(layer.weight, rank=layer.full_rank)
        return Decomposition(found.left, found.right, found.singular_values)
