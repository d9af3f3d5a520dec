"""Optimizers as chains of small transforms over stacks of matrices; routing of a model's parameters to them."""

from deltaw.optim.adamw import AdamW
from deltaw.optim.base import BaseOptions, MatrixOptimizer
from deltaw.optim.context import Context
from deltaw.optim.driver import Driver
from deltaw.optim.hf_factory import OptimizerFactory, hf_factory
from deltaw.optim.muon import Muon
from deltaw.optim.normuon import NorMuon
from deltaw.optim.routing import Plan, Row, explain, optimizer
from deltaw.optim.transform import Chain, Elementwise, TensorSpec, Transform, chain
from deltaw.optim.transforms import (
    SCALE_RULES,
    Adam,
    ClipGlobalNorm,
    MatchRMS,
    Momentum,
    NeuronNorm,
    Orthogonalize,
    ShapeScale,
    adam,
    clip_global_norm,
    match_rms,
    momentum,
    nesterov,
    neuron_norm,
    orthogonalize,
    scale_by_shape,
)

__all__ = [
    "SCALE_RULES",
    "Adam",
    "AdamW",
    "BaseOptions",
    "Chain",
    "ClipGlobalNorm",
    "Context",
    "Driver",
    "Elementwise",
    "MatchRMS",
    "MatrixOptimizer",
    "Momentum",
    "Muon",
    "NeuronNorm",
    "NorMuon",
    "OptimizerFactory",
    "Orthogonalize",
    "Plan",
    "Row",
    "ShapeScale",
    "TensorSpec",
    "Transform",
    "adam",
    "chain",
    "clip_global_norm",
    "explain",
    "hf_factory",
    "match_rms",
    "momentum",
    "nesterov",
    "neuron_norm",
    "optimizer",
    "orthogonalize",
    "scale_by_shape",
]
