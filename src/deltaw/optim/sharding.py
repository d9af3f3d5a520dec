"""Sharded matrices (FSDP2): each rank works on whole matrices, and no matrix is worked on twice.

Elementwise and row-wise transforms stay on the local rows. For a transform that needs whole matrices the K
matrices of a chunk are dealt out in contiguous shares of ceil(K/W) to the W ranks: one all-to-all brings each
rank the rows of its own matrices, one brings the results back. Sent per rank: 2·K·m·n/W·(W−1)/W numbers, in the
dtype of the stack. Shards are padded to ceil(m/W) rows, as ranks at the end may hold fewer or none.

Held to: one mesh dimension with Shard(0) of unfused [m, n] weights; everything else is refused, not guessed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaw.errors import CompositionError
from deltaw.models import Site

if TYPE_CHECKING:
    from deltaw.optim.context import Context
    from deltaw.optim.transform import Chain, Transform


def is_dtensor(t: Any) -> bool:
    """True for a DTensor, without importing torch.distributed.tensor where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The rows this rank holds, in the memory of `t`; an ordinary tensor is its own."""
    if not is_dtensor(t):
        return t
    with torch.no_grad():
        return t.to_local()  # type: ignore[attr-defined]


def mesh_of(p: Tensor) -> Any:
    """The mesh over which the rows of `p` are sharded; None when this rank holds all of them."""
    if not is_dtensor(p) or all(x.is_replicate() for x in p.placements):  # type: ignore[attr-defined]
        return None
    return p.device_mesh  # type: ignore[attr-defined]


def check_placement(p: Tensor, name: str, site: Site | None, chain: Chain) -> None:
    """Refuse a sharded parameter that the chain cannot serve exactly. Raises CompositionError."""
    mesh = mesh_of(p)
    if mesh is None or not chain.needs_matrices:
        return
    placements = p.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise CompositionError(
            f"parameter {name!r} is placed {placements} on a {mesh.ndim}-D mesh; matrix optimizers support Shard(0) on a "
            "1-D mesh (fully_shard's default)"
        )
    if site is not None and (site.split or site.kind != "linear" or site.layout != "out_in"):
        raise CompositionError(
            f"parameter {name!r} is sharded by rows and read as {site.kind} ({site.layout}, blocks {site.split}): rows of "
            "one matrix must not straddle ranks; leave this module unsharded or send it to AdamW with a rule"
        )
    for t in chain.transforms:
        if t.scope == "model":
            raise CompositionError(
                f"{type(t).__name__} needs norms over all shards and does not support sharded parameters"
            )
        if t.sharding == "whole" and t.state_spec((1, 1), p.dtype):
            raise CompositionError(
                f"{type(t).__name__} keeps state of whole matrices and does not support sharded parameters"
            )


def zeros_rows(p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros of the given whole shape; sharded by rows like `p` when `p` is."""
    mesh = mesh_of(p)
    if mesh is None:
        return torch.zeros(shape, dtype=dtype, device=p.device)
    from torch.distributed.tensor import zeros

    return zeros(shape, dtype=dtype, device_mesh=mesh, placements=p.placements)  # type: ignore[attr-defined]


def run_whole(t: Transform, u: Tensor, ctx: Context) -> Tensor:
    """Apply a stateless whole-matrix transform to sharded stacks [K, m_local, n]; returns the local rows again."""
    group = ctx.mesh.get_group()
    world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    (m, n), count, held = ctx.shape, len(u), u.shape[1]  # type: ignore[misc]
    share, rows = -(-count // world), -(-m // world)

    sent = u.new_zeros(world * share, rows, n)
    sent[:count, :held] = u
    received = torch.empty_like(sent)
    _all_to_all(received, sent, group)
    whole = received.view(world, share, rows, n).transpose(0, 1).reshape(share, world * rows, n)

    first = rank * share
    mine = max(0, min(share, count - first))
    back = u.new_zeros(share, world * rows, n)
    if mine:
        back[:mine, :m] = t.update(whole[:mine, :m].contiguous(), {}, ctx.select(first, first + mine))
    _all_to_all(received, back.view(share, world, rows, n).transpose(0, 1).contiguous(), group)
    return received[:count, :held].contiguous()


def _all_to_all(out: Tensor, x: Tensor, group: Any) -> None:
    # as bytes: gloo has no bfloat16 collectives
    torch.distributed.all_to_all_single(out.view(torch.uint8), x.view(out.shape).view(torch.uint8), group=group)
