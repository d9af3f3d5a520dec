"""What the sheets say must hold of Muon and NorMuon."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_helpers import gradients, largest, parameters, run, train

from deltaw.optim import Muon, NorMuon

EXACT = {"method": "exact", "dtype": torch.float64}


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_ema_and_sum_momentum_give_the_same_steps(nesterov):
    """The two looked-ahead matrices are proportional, and the polar factor has no scale."""
    forms = [
        run(lambda p, f=form: Muon(p, momentum_form=f, nesterov=nesterov, **EXACT), dtype=torch.float64)
        for form in ("ema", "sum")
    ]
    assert largest(*forms) < 1e-12


@given(exponent=st.integers(-12, 12))
@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("cls", [Muon, NorMuon])
def test_scaling_all_gradients_changes_nothing(cls, exponent):
    a, b = cls(parameters()), cls(parameters())
    train(a, 3)
    train(b, 3, scale=2.0**exponent)
    assert largest(a.parameters(), b.parameters()) == 0


def test_muon_keeps_the_spectral_norm_below_one_over_the_decay():
    (w,) = parameters([(8, 8)], dtype=torch.float64)
    start = torch.linalg.matrix_norm(w.detach(), 2).item()
    opt = Muon([w], lr=0.1, weight_decay=0.5, scale="none", **EXACT)
    for step in range(60):  # a constant push outwards
        w.grad = gradients([w], 0)[0]
        opt.step()
        assert torch.linalg.matrix_norm(w.detach(), 2).item() <= max(start, 1 / 0.5) + 1e-9, step


def test_muon_commutes_with_transposition():
    tall = run(lambda p: Muon(p, scale="none", **EXACT), [(10, 6)], dtype=torch.float64)[0]
    params = parameters([(10, 6)], dtype=torch.float64)
    flat = torch.nn.Parameter(params[0].detach().mT.clone())
    opt = Muon([flat], scale="none", **EXACT)
    for step in range(4):
        flat.grad = gradients(params, step)[0].mT.clone()
        opt.step()
    assert largest([tall.mT], [flat.detach()]) < 1e-12


@pytest.mark.parametrize(("beta2", "steps"), [(0.95, 1), (0.0, 3)])
def test_normuon_rows_are_equal_at_step_one_and_always_without_memory(beta2, steps):
    params = parameters([(24, 8)], dtype=torch.float64)
    opt = NorMuon(params, lr=1.0, weight_decay=0.0, beta2=beta2, preserve_norm=True, scale="none", **EXACT)
    for step in range(steps):
        before = params[0].detach().clone()
        train(opt, 1, start=step)
        update = before - params[0].detach()
        rows = update.norm(dim=1)
        assert (rows.max() - rows.min()).item() < 1e-8
        assert update.norm().item() == pytest.approx(8**0.5, abs=1e-8)  # that of a polar factor of rank 8


def test_normuon_is_muon_on_wide_matrices_up_to_scale():
    """Rows of an exact polar factor with m <= n have norm one, so there is nothing to equalise."""
    shapes, lr = [(6, 15)], 0.02
    nor = run(lambda p: NorMuon(p, lr=lr, weight_decay=0.0, **EXACT), shapes, dtype=torch.float64)
    muon = run(lambda p: Muon(p, lr=lr * 0.2 * 15**0.5, weight_decay=0.0, **EXACT), shapes, dtype=torch.float64)
    assert largest(nor, muon) < 1e-9


def test_normuon_updates_have_rms_one_fifth():
    params = parameters([(24, 8), (8, 24)])
    opt = NorMuon(params, lr=1.0, weight_decay=0.0)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        train(opt, 1, start=step)
        for p, old in zip(params, before, strict=True):
            assert (p.detach() - old).square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-4)


def test_normuon_holds_one_vector_more_than_muon():
    muon, nor = Muon(parameters([(9, 4)])), NorMuon(parameters([(9, 4)]))
    size = [sum(v.numel() for v in o.state[o.parameters()[0]].values()) for o in (muon, nor)]
    assert size[1] - size[0] == 9


@pytest.mark.parametrize("cls", [Muon, NorMuon])
def test_zero_and_one_row_matrices(cls):
    params = parameters([(4, 6), (1, 6), (6, 1)])
    opt = cls(params, weight_decay=0.0)
    before = params[0].detach().clone()
    params[0].grad = torch.zeros(4, 6)
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(params[0], before)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("cls", [Muon, NorMuon])
def test_both_minimise(cls):
    """A least-squares problem falls by a factor of a hundred."""
    g = torch.Generator().manual_seed(0)
    target, x = torch.randn(6, 8, generator=g), torch.randn(64, 8, generator=g)
    w = torch.nn.Parameter(torch.zeros(6, 8))
    opt = cls([w], lr=0.1, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.01, 150)

    def loss():
        opt.zero_grad()
        value = (x @ (w - target).T).square().mean()
        value.backward()
        return value

    first = loss().item()
    for _ in range(150):
        last = opt.step(loss).item()
        decay.step()
    assert last < first / 100
