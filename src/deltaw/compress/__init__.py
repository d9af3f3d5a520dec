"""Compression: calibrate → plan → factorise → install; one file a method.

report = compress(model, "svd-llm", ratio=0.6, calibration=batches)
save_compressed(model, "small")                 # factored, read by deltaw.compress.load
save_compressed(model, "plain", dense=True)     # multiplied out, read by transformers
"""

from deltaw._callable import make_callable
from deltaw.compress.base import Compressor, Decomposition, Factors, Layer
from deltaw.compress.engine import compress
from deltaw.compress.lord import LORD
from deltaw.compress.plan import ALLOCATIONS, Menu, allocate
from deltaw.compress.report import CompressionReport
from deltaw.compress.store import load, save_compressed
from deltaw.compress.svd import SVD
from deltaw.compress.svd_llm import SVDLLM

__all__ = [
    "ALLOCATIONS",
    "LORD",
    "SVD",
    "SVDLLM",
    "CompressionReport",
    "Compressor",
    "Decomposition",
    "Factors",
    "Layer",
    "Menu",
    "allocate",
    "compress",
    "load",
    "save_compressed",
]

make_callable(__name__, compress)
