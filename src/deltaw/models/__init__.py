"""Finding the matrices of a model, capturing activations and gradients, reading and writing checkpoints."""

from deltaw.models.capture import capture
from deltaw.models.checkpoint import Checkpoint, open_checkpoint
from deltaw.models.folders import atomic_folder
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
from deltaw.models.statistics import Statistics
from deltaw.models.writer import CheckpointWriter

__all__ = [
    "MATRIX_ROLES",
    "ROLES",
    "Checkpoint",
    "CheckpointWriter",
    "Site",
    "Statistics",
    "atomic_folder",
    "capture",
    "find_sites",
    "get_parameter",
    "inventory",
    "open_checkpoint",
    "qkv_split",
    "tied_groups",
]
