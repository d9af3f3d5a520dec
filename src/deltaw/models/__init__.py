"""Finding the matrices of a model, capturing activations and gradients, reading and writing checkpoints."""

from deltaw.models.sites import (
    MATRIX_ROLES,
    ROLES,
    Site,
    find_sites,
    get_parameter,
    inventory,
    qkv_split,
    tied_groups,
)

__all__ = [
    "MATRIX_ROLES",
    "ROLES",
    "Site",
    "find_sites",
    "get_parameter",
    "inventory",
    "qkv_split",
    "tied_groups",
]
