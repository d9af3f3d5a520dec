"""What each gloo process of test_optim_sharding.py does."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from optim_helpers import gradients, largest, parameters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from deltaw import linalg
from deltaw.errors import CompositionError, NonFiniteError
from deltaw.optim import Muon, NorMuon, optimizer

#: uneven on two and on three ranks; five of one shape, one with fewer rows than ranks
SHAPES = [(7, 6), (7, 6), (7, 6), (7, 6), (7, 6), (12, 5), (2, 6)]


def start(rank: int, world: int, folder: str) -> None:
    """Join the group, run every check."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    try:
        for cls in (Muon, NorMuon):
            check_equals_single_process(cls, mesh, torch.float64, 1e-10)
            check_equals_single_process(cls, mesh, torch.float32, 1e-5)
        check_calls_and_bytes(mesh)
        check_ranks_decide_alike(mesh)
        check_checkpoint(mesh)
        check_refusals(mesh)
        if world == 2:
            check_fully_shard(mesh)
        dist.barrier()  # a process that leaves while another still talks to it can bring that one down
        Path(folder, f"passed{rank}").touch()
    finally:
        dist.destroy_process_group()


def sharded(mesh, dtype=torch.float64, shapes=SHAPES):
    """The seeded parameters, sharded by rows."""
    return [
        torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in parameters(shapes, dtype=dtype)
    ]


def step(opt, mesh, number: int, scale: float = 1.0):
    params = opt.parameters()
    for p, g in zip(params, gradients(params, number), strict=True):
        p.grad = distribute_tensor(g * scale, mesh, [Shard(0)]) if isinstance(p, DTensor) else g * scale
    opt.step()


def whole(params):
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]


def check_equals_single_process(cls, mesh, dtype, tolerance):
    exact = {"method": "exact", "dtype": dtype}
    apart, alone = cls(sharded(mesh, dtype), **exact), cls(parameters(SHAPES, dtype=dtype), **exact)
    for number in range(4):
        step(apart, mesh, number)
        step(alone, mesh, number)
    error = largest(whole(apart.parameters()), whole(alone.parameters()))
    assert error <= tolerance, (cls, dtype, error)
    for p, q in zip(apart.parameters(), alone.parameters(), strict=True):
        for key, value in alone.state[q].items():
            assert largest([apart.state[p][key].full_tensor() if key != "step" else value], [value]) <= tolerance, key


def check_calls_and_bytes(mesh):
    """Each matrix is orthogonalized once in the world; two all-to-alls a stack carry what the docstring says."""
    opt = Muon(sharded(mesh, torch.float32))
    matrices, sent = [], []
    true_polar, true_exchange = linalg.orthogonalize, dist.all_to_all_single

    def polar(x, *args, **kwargs):
        matrices.append(len(x))
        return true_polar(x, *args, **kwargs)

    def exchange(out, x, **kwargs):
        sent.append(x.numel() * x.element_size())
        return true_exchange(out, x, **kwargs)

    with mock.patch.object(linalg, "orthogonalize", polar), mock.patch.object(dist, "all_to_all_single", exchange):
        step(opt, mesh, 0)
    total = torch.tensor([float(sum(matrices))])
    dist.all_reduce(total)
    assert total.item() == len(SHAPES)
    world = mesh.size()
    expected = []
    for shape, count in {(7, 6): 5, (12, 5): 1, (2, 6): 1}.items():
        padded = -(-count // world) * world * -(-shape[0] // world) * shape[1] * 4
        expected += [padded, padded]
    assert sorted(sent) == sorted(expected), (sent, expected)


def check_ranks_decide_alike(mesh):
    """NaN in the rows of one rank stops all of them."""
    for policy in ("skip", "raise"):
        opt = Muon(sharded(mesh), nonfinite=policy)
        step(opt, mesh, 0)
        before = whole(opt.parameters())
        for p, g in zip(opt.parameters(), gradients(opt.parameters(), 1), strict=True):
            p.grad = distribute_tensor(g, mesh, [Shard(0)])
        if mesh.get_rank() == 0:
            opt.parameters()[0].grad.to_local()[0, 0] = float("nan")
        try:
            opt.step()
            assert policy == "skip"
        except NonFiniteError:
            assert policy == "raise"
        assert largest(whole(opt.parameters()), before) == 0


def check_checkpoint(mesh):
    """State is sharded like its parameter, loads into its place, and the run goes on bit for bit."""
    one = NorMuon(sharded(mesh, torch.float32))
    step(one, mesh, 0)
    two = NorMuon([torch.nn.Parameter(p.detach().clone()) for p in one.parameters()])
    two.load_state_dict(one.state_dict())
    for value in two.state[two.parameters()[0]].values():
        assert value.ndim == 0 or value.placements == (Shard(0),)
    step(one, mesh, 1)
    step(two, mesh, 1)
    assert largest(whole(one.parameters()), whole(two.parameters())) == 0


def check_refusals(mesh):
    def refused(build, text):
        with pytest.raises(CompositionError, match=text):
            build()

    (p,) = sharded(mesh, shapes=[(8, 6)])
    refused(lambda: Muon([{"params": [p], "views": [("linear", "out_in", (4, 4))]}]), "straddle")
    refused(lambda: Muon([{"params": [p], "views": [("conv1d", "in_out", ())]}]), "straddle")
    columns = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    refused(lambda: Muon([columns]), r"Shard\(0\)")


def check_fully_shard(mesh):
    """A model under FSDP2 against the same model alone, routed, with clipping."""
    from torch.distributed.fsdp import fully_shard

    def build():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 6), torch.nn.LayerNorm(6)]
        return torch.nn.Sequential(*layers).double()

    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone, apart = build(), build()
    fully_shard(apart[0], mesh=mesh)
    fully_shard(apart, mesh=mesh)
    options = {"lr": 0.02, "adamw_lr": 0.01}
    first, second = optimizer(alone, "normuon", **options), optimizer(apart, "normuon", **options)
    rank = mesh.get_rank()
    for _ in range(3):
        alone(x).pow(4).mean().backward()
        apart(x[rank::2]).pow(4).mean().backward()
        for model, opt in ((alone, first), (apart, second)):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            opt.zero_grad()
    assert largest(whole(apart.parameters()), whole(alone.parameters())) <= 1e-10


if __name__ == "__main__":
    start(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
