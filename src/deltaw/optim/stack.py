"""Stacks: the members of equal shape that take their step together, and the walk of a chunk through a chain.

A stack is transient: it is formed at each step from the parameters as they then stand in `param_groups`, at most
`chunk_bytes` large, and freed. Members without a gradient are left out, so neither their state nor their step
moves.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.models import Site
from deltaw.optim.context import Context
from deltaw.optim.sharding import local, mesh_of, run_whole
from deltaw.optim.transform import Chain, Elementwise, Listed, Stacked, TensorSpec
from deltaw.optim.views import block_shapes

State = dict[str, Any]
StatePlan = list[dict[str, tuple[str, TensorSpec]]]


@dataclass(frozen=True)
class Member:
    """One matrix of one parameter (or, in an elementwise chain, the parameter itself: `site` None)."""

    param: Tensor
    group: int  # index into param_groups
    name: str
    site: Site | None
    block: int = 0  # which of the site's row blocks

    @property
    def blocks(self) -> int:
        """How many members its parameter has."""
        return len(block_shapes(self.site)) if self.site else 1

    @property
    def shape(self) -> tuple[int, int] | None:
        """(m, n), or None in an elementwise chain."""
        return block_shapes(self.site)[self.block] if self.site else None

    @property
    def rows(self) -> int:
        """Rows of the stack it takes: one, or one per expert."""
        return self.site.shape[0] if self.site and self.site.kind == "expert-stack" else 1

    def view(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor that has the parameter's shape, in the parameter's memory."""
        tensor = local(tensor)
        return self.site.views(tensor)[self.block] if self.site else tensor

    def state(self, state: State, stored: str, spec: TensorSpec) -> Tensor:
        """Its part of one state entry."""
        if spec.shape is None:
            return self.view(state[stored])
        return local(state[state_key(stored, self.block, self.blocks)])


@dataclass(frozen=True)
class Chunk:
    """Members that form one stack, the chain they go through, and where their state is."""

    members: tuple[Member, ...]
    chain: Chain
    plan: StatePlan
    maximize: bool


def state_key(stored: str, block: int, blocks: int) -> str:
    """Name in `optimizer.state[p]` of a per-matrix entry: numbered when the parameter holds several blocks."""
    return stored if blocks == 1 else f"{stored}.{block}"


def members_of(param: Tensor, group: int, name: str, site: Site | None) -> list[Member]:
    """The members of one parameter."""
    blocks = len(block_shapes(site)) if site else 1
    return [Member(param, group, name if blocks == 1 else f"{name}[{i}]", site, i) for i in range(blocks)]


def form_chunks(members: Iterable[tuple[Member, Chain, bool]], chunk_bytes: int) -> list[Chunk]:
    """Group (member, chain, maximize) by everything that must be equal in a stack, and cut at `chunk_bytes`."""
    groups: dict[Any, list[Member]] = {}
    for member, chain, maximize in members:
        p = member.param
        mesh = mesh_of(p)
        placed = (mesh, tuple(p.placements)) if mesh is not None else None  # type: ignore[attr-defined]
        ranks = member.site.kind == "expert-stack" if member.site else None
        groups.setdefault((chain, member.shape, p.dtype, p.device, placed, ranks, maximize), []).append(member)
    chunks = []
    for (chain, shape, dtype, *_, maximize), found in groups.items():
        plan = chain.state_plan(shape or (0, 0), dtype)
        held: list[Member] = []
        size = 0
        for member in found:
            cost = member.param.numel() // member.blocks * member.param.element_size()
            if held and size + cost > chunk_bytes:
                chunks.append(Chunk(tuple(held), chain, plan, maximize))
                held, size = [], 0
            held.append(member)
            size += cost
        chunks.append(Chunk(tuple(held), chain, plan, maximize))
    return chunks


def run_chain(chain: Chain, chunks: Sequence[Chunk], contexts: Iterable[Context], states: Any) -> None:
    """Take one step with all chunks of one chain. `states` maps a parameter to its state.

    Chunk by chunk, so that only one stack is alive; a chain with a transform of scope "model" keeps the updates of
    all chunks between its stages instead.
    """
    walks = ((_walk(chunk, ctx, states), chunk, ctx) for chunk, ctx in zip(chunks, contexts, strict=True))
    if chain.scope == "matrix":
        for walk, _, _ in walks:
            for _ in walk:
                pass
        return
    held = list(walks)
    waiting = [next(walk) for walk, _, _ in held]
    for i, t in enumerate(chain.transforms):
        if t.scope != "model":
            continue
        merged = Context.merge([ctx for _, _, ctx in held])
        state: Listed = {}
        for _, chunk, _ in held:
            for name, tensors in _listed(chunk, i, states).items():
                state.setdefault(name, []).extend(tensors)
        joined = t.update_list([x for u in waiting for x in u], state, merged)  # type: ignore[attr-defined]
        sent, at = [], 0
        for (walk, _, _), u in zip(held, waiting, strict=True):
            try:
                sent.append(walk.send(joined[at : at + len(u)]))
            except StopIteration:
                sent.append([])
            at += len(u)
        waiting = sent


def _walk(chunk: Chunk, ctx: Context, states: Any) -> Generator[list[Tensor], list[Tensor], None]:
    """One chunk through its chain. Yields the updates where a model-wide transform takes over, and gets them back."""
    u: Any = ctx.grads
    last = len(chunk.chain.transforms) - 1
    for i, t in enumerate(chunk.chain.transforms):
        if isinstance(t, Elementwise) and isinstance(u, Tensor):
            u = ctx.rows(u)
        if t.scope == "model":
            u = yield u
            if i == last:
                ctx.descend(ctx.weights, u)
        elif isinstance(t, Elementwise):
            listed = _listed(chunk, i, states)
            if i == last:
                t.write(ctx.weights, u, listed, ctx)
            else:
                u = t.update_list(u, listed, ctx)
        else:
            if not isinstance(u, Tensor):
                u = ctx.stack(u, t.stack_dtype(ctx.weights[0]))
            if ctx.mesh is not None and t.sharding == "whole":
                u = run_whole(t, u, ctx)
                if i == last:
                    ctx.descend(ctx.weights, ctx.rows(u))
                continue
            stacked: Stacked = {k: ctx.stack(v) for k, v in _listed(chunk, i, states).items()}
            if i == last:
                t.write(ctx.weights, u, stacked, ctx)
            else:
                u = t.update(u, stacked, ctx)
            for name, tensors in _listed(chunk, i, states).items():
                torch._foreach_copy_(tensors, ctx.rows(stacked[name]))
    for i, t in enumerate(chunk.chain.transforms):
        t.after_step(ctx.weights, _listed(chunk, i, states), ctx)


def _listed(chunk: Chunk, index: int, states: Any) -> Listed:
    """Transform `index`'s state entries, one tensor per member, in the parameters' own memory."""
    return {
        name: [member.state(states[member.param], stored, spec) for member in chunk.members]
        for name, (stored, spec) in chunk.plan[index].items()
    }
