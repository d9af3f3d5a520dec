"""Stacks, views and chains: grouping must not change a single number."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_helpers import gradients, largest, parameters, run, train

from deltaw.errors import CompositionError, OptionError, UnknownNameError
from deltaw.optim import (
    Adam,
    Elementwise,
    MatrixOptimizer,
    Muon,
    NorMuon,
    TensorSpec,
    Transform,
    adam,
    chain,
    clip_global_norm,
    match_rms,
    momentum,
    neuron_norm,
    orthogonalize,
    scale_by_shape,
)

EXACT = {"method": "exact", "dtype": torch.float64}
CLASSES = pytest.mark.parametrize("cls", [Muon, NorMuon])


@CLASSES
@given(chunk=st.integers(1, 5000))
@settings(max_examples=8, deadline=None)
def test_chunk_size_changes_nothing(cls, chunk):
    shapes = [(6, 4)] * 5 + [(4, 6)] * 3
    whole = run(lambda p: cls(p, **EXACT), shapes, dtype=torch.float64)
    cut = run(lambda p: cls(p, chunk_bytes=chunk, **EXACT), shapes, dtype=torch.float64)
    assert largest(whole, cut) < 1e-13


def test_chunks_respect_their_limit():
    opt = Muon(parameters([(6, 4)] * 5), chunk_bytes=2 * 6 * 4 * 4)
    for p, g in zip(opt.parameters(), gradients(opt.parameters(), 0), strict=True):
        p.grad = g
    opt.step()
    (chunks,) = opt._plan.chunks.values()
    assert [len(c.members) for c in chunks] == [2, 2, 1]


def _views_case(view, stored, unstored, shape):
    """One parameter with a view against the same matrices as plain parameters."""
    (p,) = parameters([shape], dtype=torch.float64)
    plain = [torch.nn.Parameter(x.clone()) for x in unstored(p.detach())]
    one = NorMuon([{"params": [p], "views": [view]}], **EXACT)
    many = NorMuon(plain, **EXACT)
    for step in range(3):
        g = gradients([p], step)[0]
        p.grad = g
        for q, x in zip(plain, unstored(g), strict=True):
            q.grad = x.clone()
        one.step()
        many.step()
    assert largest(unstored(p.detach()), plain) < 1e-13
    numbers = sum(v.numel() for k, v in one.state[p].items() if k != "step")
    assert numbers == sum(v.numel() for q in plain for k, v in many.state[q].items() if k != "step")
    assert stored == tuple(one.state[p]["momentum_buffer"].shape)
    return one


def test_fused_rows_are_independent_matrices():
    opt = _views_case(("linear", "out_in", (8, 4, 4)), (16, 6), lambda x: list(x.split([8, 4, 4])), (16, 6))
    assert {"second_moment.0", "second_moment.1", "second_moment.2"} <= set(opt.state[opt.parameters()[0]])


def test_conv1d_is_read_transposed():
    _views_case(("conv1d", "in_out", ()), (6, 10), lambda x: [x.mT], (6, 10))


def test_fused_conv1d():
    _views_case(("conv1d", "in_out", (4, 4, 4)), (6, 12), lambda x: list(x.mT.split(4)), (6, 12))


def test_conv_kernels_are_flattened():
    _views_case(("conv", "out_in", ()), (8, 3, 2, 2), lambda x: [x.flatten(1)], (8, 3, 2, 2))
    a = run(lambda p: Muon(p, **EXACT), [(8, 3, 2, 2)], dtype=torch.float64)
    b = run(
        lambda p: Muon([{"params": p, "views": [("conv", "out_in", ())]}], **EXACT), [(8, 3, 2, 2)], dtype=torch.float64
    )
    assert largest(a, b) == 0


def test_expert_stacks_are_batches():
    _views_case(("expert-stack", "out_in", ()), (3, 5, 4), list, (3, 5, 4))


def test_fused_transposed_expert_stacks():
    _views_case(
        ("expert-stack", "in_out", (5, 5)),
        (3, 4, 10),
        lambda x: [b for half in x.mT.split(5, dim=-2) for b in half],
        (3, 4, 10),
    )


@pytest.mark.parametrize(
    ("view", "text"),
    [
        (("linear", "out_in", (3, 4)), "do not add up"),
        (("linear", "up", ()), "layout"),
        (("matrix", "out_in", ()), "kind is one of"),
        (("expert-stack", "out_in", ()), "shape"),
        ("linear", "expected"),
    ],
)
def test_bad_views(view, text):
    with pytest.raises(OptionError, match=text):
        Muon([{"params": parameters([(8, 4)]), "views": [view]}])
    with pytest.raises(OptionError, match="1 views for 2"):
        Muon([{"params": parameters([(8, 4)] * 2), "views": [("linear", "out_in", ())]}])


def test_groups_with_equal_options_share_stacks_and_keep_their_rates():
    mats = parameters([(6, 4)] * 4, dtype=torch.float64)
    groups = [{"params": mats[:2], "lr": 0.1}, {"params": mats[2:], "lr": 0.02, "weight_decay": 0.5}]
    opt = Muon(groups, **EXACT)
    train(opt, 3)
    (chunks,) = opt._plan.chunks.values()
    assert len(chunks) == 1
    alone = parameters([(6, 4)] * 4, dtype=torch.float64)
    a, b = Muon(alone[:2], lr=0.1, **EXACT), Muon(alone[2:], lr=0.02, weight_decay=0.5, **EXACT)
    for step in range(3):
        for p, g in zip(alone, gradients(alone, step), strict=True):
            p.grad = g
        a.step()
        b.step()
    assert largest(mats, alone) < 1e-13


# -- chains ----------------------------------------------------------------------------------------------------


def test_the_last_transform_may_be_any():
    """`write` of every transform equals `update` followed by the plain subtraction."""

    @dataclass(frozen=True)
    class Same(Elementwise):
        def update_list(self, u, state, ctx):
            return u

    tails = [[adam()], [momentum()], [orthogonalize(**EXACT)], [momentum(), match_rms()], [scale_by_shape("spectral")]]
    tails += [[neuron_norm()], [neuron_norm(preserve_norm=True)]]
    for tail in tails:
        results = [
            run(lambda p, c=c: MatrixOptimizer(p, lr=0.1, weight_decay=0.1, chain=c), dtype=torch.float64)
            for c in (tail, [*tail, Same()])
        ]
        assert largest(*results) < 1e-14, tail


def test_equal_state_names_in_one_chain_stay_apart():
    opt = MatrixOptimizer(parameters(), lr=0.1, chain=[momentum(0.9), momentum(0.5)])
    train(opt, 2)
    state = opt.state[opt.parameters()[0]]
    assert set(state) == {"step", "momentum_buffer", "momentum_buffer_2"}
    assert not torch.equal(state["momentum_buffer"], state["momentum_buffer_2"])
    names = set(opt.param_groups[0]) - {"params"}
    assert {"momentum", "nesterov"} <= names or {"momentum.momentum"} <= names


def test_options_of_disagreeing_transforms_are_qualified():
    both = chain(neuron_norm(eps=1e-3), adam(eps=1e-8))
    assert both.options()["neuron_norm.eps"] == 1e-3
    assert both.options()["adam.eps"] == 1e-8
    changed = both.with_options({"adam.eps": 1e-4})
    assert (changed.transforms[0].eps, changed.transforms[1].eps) == (1e-3, 1e-4)
    assert chain(neuron_norm(eps=1e-8), Adam(eps=1e-8)).options()["eps"] == 1e-8
    with pytest.raises(UnknownNameError, match=r"adam\.eps"):
        both.with_options({"adan.eps": 1.0})
    with pytest.raises(OptionError):
        chain("adam")
    with pytest.raises(OptionError):
        chain()


def test_a_global_clip_sees_all_members():
    """Over shapes and chunks alike, against torch's own clipping of the gradients."""
    mine = MatrixOptimizer(parameters(), lr=0.1, chunk_bytes=1, chain=[clip_global_norm(0.5), scale_by_shape("none")])
    train(mine, 2)
    theirs = torch.optim.SGD(parameters(), lr=0.1)
    params = theirs.param_groups[0]["params"]
    for step in range(2):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        theirs.step()
    assert largest(mine.parameters(), params) < 1e-6
    last = MatrixOptimizer(parameters(), lr=0.1, chain=[clip_global_norm(0.5)])
    train(last, 2)
    assert largest(last.parameters(), params) < 1e-6


@dataclass(frozen=True)
class Subspace(Transform):
    """A combinator as later methods will write it: run an elementwise transform in a random subspace of rank r."""

    inner: Elementwise
    rank: int

    def state_spec(self, shape, dtype):
        small = (self.rank, shape[1])
        return {
            name: TensorSpec(small, spec.dtype or dtype) for name, spec in self.inner.state_spec(small, dtype).items()
        }

    def options(self):
        return {"rank": self.rank, **self.inner.options()}

    def with_options(self, changes):
        own = {k: v for k, v in changes.items() if k == "rank"}
        rest = {k: v for k, v in changes.items() if k != "rank"}
        return Subspace(self.inner.with_options(rest) if rest else self.inner, own.get("rank", self.rank))

    def update(self, u, state, ctx):
        m = u.shape[-2]
        q = ctx.shared(("basis", m, self.rank), lambda: self._basis(m, u, ctx))
        return q.mT @ self.inner.update(q @ u, state, ctx)

    def _basis(self, m, u, ctx):
        g = ctx.generator("basis")
        return torch.linalg.qr(torch.randn(m, self.rank, generator=g, dtype=u.dtype))[0].mT


def test_combinators_wrap_elementwise_transforms():
    opt = MatrixOptimizer(parameters([(6, 4)] * 3), lr=0.1, chain=[Subspace(adam(), 2)])
    p = opt.parameters()[0]
    assert opt.state[p]["exp_avg"].shape == (2, 4)
    opt.param_groups[0]["betas"] = (0.8, 0.9)
    before = p.detach().clone()
    train(opt, 1)
    update = before - p.detach()
    assert torch.linalg.matrix_rank(update) == 2
    # Adam's first step is the sign of the projected gradient, whatever the betas
    q = opt.constants["basis", 6, 2]
    expected = q.mT @ (q @ gradients(opt.parameters(), 0)[0]).sign() * 0.1
    assert largest([update], [expected]) < 1e-5
    assert opt.state[p]["exp_avg"].abs().max() > 0


@dataclass(frozen=True)
class Average(Elementwise):
    """Keeps a running mean of the weights after each step."""

    def state_spec(self, shape, dtype):
        return {"average": TensorSpec(None, torch.float64)}

    def update_list(self, u, state, ctx):
        return u

    def after_step(self, weights, state, ctx):
        for a, w, t in zip(state["average"], weights, ctx.steps, strict=True):
            a.lerp_(w.double(), 1 / t)


def test_after_step_sees_the_new_weights_and_its_state():
    opt = MatrixOptimizer(parameters(), lr=0.1, chain=[momentum(), Average()])
    seen = []
    for step in range(3):
        train(opt, 1, start=step)
        seen.append([p.detach().double() for p in opt.parameters()])
    means = [torch.stack(x).mean(0) for x in zip(*seen, strict=True)]
    assert largest([opt.state[p]["average"] for p in opt.parameters()], means) < 1e-12


@dataclass(frozen=True)
class Probe(Transform):
    """Records what it is shown."""

    needs = frozenset({"input_cov"})

    def update(self, u, state, ctx):
        ctx.shared("seen", list).append(
            {
                "grad": ctx.grad.clone(),
                "weight": ctx.weight.clone(),
                "step": ctx.step.flatten().tolist(),
                "lr": ctx.lr.flatten().tolist(),
                "decay": ctx.weight_decay.shape,
                "stat": ctx.stat("input_cov"),
                "common": torch.rand(1, generator=ctx.generator("a")).item(),
                "own": [torch.rand(1, generator=ctx.generator("a", i)).item() for i in range(len(ctx.names))],
                "names": ctx.names,
            }
        )
        return u


def test_the_context_tells_the_truth():
    params = parameters([(3, 2)] * 3)
    cov = torch.eye(2)
    named = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
    statistics = {("input_cov", f"layer{i}"): cov * i for i in range(3)}
    groups = [{"params": named[:2], "lr": 0.5}, {"params": named[2:], "lr": 0.25}]
    opt = MatrixOptimizer(groups, lr=0.1, chain=[Probe()], statistics=statistics, seed=3)
    params[1].requires_grad_(True)
    start = [p.detach().clone() for p in params]
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    opt.step()
    params[1].grad = None
    opt.step()
    first, second = opt.constants["seen"]
    assert torch.equal(first["grad"], torch.stack(gradients(params, 0)))
    assert torch.equal(first["weight"], torch.stack(start))
    assert first["lr"] == [0.5, 0.5, 0.25]
    assert first["decay"] == (3, 1, 1)
    assert first["names"] == ("layer0.weight", "layer1.weight", "layer2.weight")
    assert torch.equal(first["stat"][2], cov * 2)
    assert (first["step"], second["step"]) == ([1, 1, 1], [2, 2])
    assert len({*first["own"], *second["own"], first["common"], second["common"]}) == 7, "all streams differ"

    again = MatrixOptimizer(named[2:], lr=0.1, chain=[Probe()], statistics=statistics, seed=3)
    params[2].grad = torch.ones(3, 2)
    again.step()
    assert again.constants["seen"][0]["own"] == first["own"][2:], "keyed by name, not by place"
    assert again.constants["seen"][0]["common"] == first["common"]


def test_missing_statistics_are_named():
    with pytest.raises(CompositionError, match="input_cov"):
        MatrixOptimizer(parameters(), lr=0.1, chain=[Probe()])
    opt = MatrixOptimizer(
        [("a.weight", parameters()[0])], lr=0.1, chain=[Probe()], statistics={("input_cov", "b"): torch.eye(2)}
    )
    opt.parameters()[0].grad = torch.ones(8, 16)
    with pytest.raises(CompositionError, match=r"'a'.*capture"):
        opt.step()


def test_the_pure_chain_compiles():
    """A chain is a pure function of update and state: traced whole, without a graph break."""
    from deltaw.optim.context import Context

    links = [momentum(), scale_by_shape("spectral"), match_rms()]

    def step(u, buffer, weight):
        ctx = Context(
            names=["a", "b"], grads=list(u), weights=list(weight), steps=[1.0, 1.0], lrs=[0.1, 0.1],
            weight_decays=[0.0, 0.0], counts=[1, 1], shape=(4, 3),
        )  # fmt: skip
        state = {"momentum_buffer": buffer}
        for link in links:
            u = link.update(u, state if link is links[0] else {}, ctx)
        return u

    g = torch.Generator().manual_seed(0)
    u, w = torch.randn(2, 4, 3, generator=g), torch.randn(2, 4, 3, generator=g)
    plain_buffer, compiled_buffer = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)
    expected = step(u.clone(), plain_buffer, w)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(u.clone(), compiled_buffer, w), expected)
    assert torch.equal(plain_buffer, compiled_buffer)
