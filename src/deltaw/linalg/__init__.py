"""Matrix routines, written once and used by every room.

Pure functions on batched tensors [..., m, n] with an explicit generator and compute dtype. They import nothing but
torch and numpy, and raise children of `DeltawError` on bad input.
"""

from deltaw.linalg.bases import orthonormal_basis, random_orthonormal
from deltaw.linalg.block_rotations import rotate_blocks, rotation_change
from deltaw.linalg.butterfly import butterfly, butterfly_inverse, givens
from deltaw.linalg.coefficients import COEFFICIENT_SETS, optimal_quintic, polar_express_coefficients
from deltaw.linalg.cone import dual_cone_weights
from deltaw.linalg.fourier import atom_rows, cosine_atoms, sparse_spectrum
from deltaw.linalg.gram_polar import gram_polar, spectral_function
from deltaw.linalg.grassmann import grassmann_geodesic, grassmann_tangent
from deltaw.linalg.grouped import add_tiled_, grouped_sum, tile, untile
from deltaw.linalg.khatri_rao import khatri_rao
from deltaw.linalg.kronecker import kronecker_rotate, stiefel_retraction
from deltaw.linalg.lanczos import Lanczos, lanczos
from deltaw.linalg.ldu import ldu
from deltaw.linalg.polar import nuclear_norm, orthogonalize, polar
from deltaw.linalg.projections import fastfood, fastfood_draw, sparse_signs
from deltaw.linalg.pursuit import orthogonal_matching_pursuit
from deltaw.linalg.quantize import (
    affine_dequantize,
    affine_quantize,
    floating_code,
    floating_dequantize,
    floating_quantize,
    pack_nibbles,
    stochastic_round,
    unpack_nibbles,
)
from deltaw.linalg.random import seeded_generator
from deltaw.linalg.reflectors import reflector_frame, reflector_vectors
from deltaw.linalg.roots import inverse_root, psd_root
from deltaw.linalg.rotary import rotary_angles, rotate_pairs
from deltaw.linalg.rotations import apply_householder, cayley, cayley_neumann, householder_wy, skew, skew_vector
from deltaw.linalg.sampled import add_sparse_rows, sampled_product
from deltaw.linalg.select import MagnitudeBracket, kth_magnitude, magnitude_counts, magnitude_of_bins, select_bin
from deltaw.linalg.singular import align_basis, singular_basis
from deltaw.linalg.sketch import gaussian_sketch, leverage_scores, sparse_sign_sketch
from deltaw.linalg.spectra import effective_rank, power_iteration, principal_angles, stable_rank
from deltaw.linalg.spectral_product import spectral_linear, spectral_product
from deltaw.linalg.stacks import stack_product
from deltaw.linalg.subspaces import leading_basis, projection_gradient
from deltaw.linalg.svd import fix_signs, gram_triplets, randomized_svd, truncated_svd
from deltaw.linalg.transforms import dct, dct_matrix, hadamard_matrix, hadamard_transform, idct
from deltaw.linalg.vectors import list_dot, orthogonal_add
from deltaw.linalg.weighted import WeightedSVD, weighted_svd

__all__ = [
    "COEFFICIENT_SETS",
    "Lanczos",
    "MagnitudeBracket",
    "WeightedSVD",
    "affine_dequantize",
    "affine_quantize",
    "align_basis",
    "add_sparse_rows",
    "add_tiled_",
    "apply_householder",
    "atom_rows",
    "butterfly",
    "butterfly_inverse",
    "cayley",
    "cayley_neumann",
    "cosine_atoms",
    "dct",
    "dct_matrix",
    "dual_cone_weights",
    "effective_rank",
    "floating_code",
    "floating_dequantize",
    "floating_quantize",
    "fastfood",
    "fastfood_draw",
    "fix_signs",
    "gaussian_sketch",
    "givens",
    "grassmann_geodesic",
    "grassmann_tangent",
    "grouped_sum",
    "gram_polar",
    "gram_triplets",
    "hadamard_matrix",
    "hadamard_transform",
    "householder_wy",
    "idct",
    "inverse_root",
    "khatri_rao",
    "kronecker_rotate",
    "kth_magnitude",
    "lanczos",
    "leading_basis",
    "ldu",
    "leverage_scores",
    "list_dot",
    "magnitude_counts",
    "magnitude_of_bins",
    "nuclear_norm",
    "optimal_quintic",
    "orthogonal_add",
    "orthogonal_matching_pursuit",
    "orthogonalize",
    "orthonormal_basis",
    "pack_nibbles",
    "polar",
    "polar_express_coefficients",
    "power_iteration",
    "principal_angles",
    "projection_gradient",
    "psd_root",
    "random_orthonormal",
    "randomized_svd",
    "reflector_frame",
    "reflector_vectors",
    "rotary_angles",
    "rotate_blocks",
    "rotate_pairs",
    "rotation_change",
    "sampled_product",
    "seeded_generator",
    "select_bin",
    "singular_basis",
    "skew",
    "skew_vector",
    "sparse_sign_sketch",
    "sparse_signs",
    "sparse_spectrum",
    "spectral_function",
    "spectral_linear",
    "spectral_product",
    "stable_rank",
    "stack_product",
    "stochastic_round",
    "truncated_svd",
    "unpack_nibbles",
    "stiefel_retraction",
    "tile",
    "untile",
    "weighted_svd",
]
