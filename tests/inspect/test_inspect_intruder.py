"""Intruder dimensions, their repair, and RankMe: closed forms and the peer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltaw.errors import DataError, NonFiniteError, OptionError
from deltaw.inspect import RankMe, intruder, rankme, repair_intruders, repair_lora
from deltaw.linalg import random_orthonormal
from tolerances import TOLERANCES


def example():
    base = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    v = torch.full((5, 1), 5**-0.5, dtype=torch.float64)
    return base, base + 20 * v @ v.mT


def matrix(m, n, seed):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_example_of_the_sheet(evidence):
    base, tuned = example()
    found = intruder(base, tuned)
    assert int(found.number) == 1
    assert bool(found.mask[0])
    # the definition, once more and by hand
    u = torch.linalg.eigh(tuned).eigenvectors.flip(-1)
    by_hand = u.abs().amax(0)
    error = float((found.cosines - by_hand).abs().max())
    assert error < 1e-12
    assert float(found.cosines[0]) == pytest.approx(0.493, abs=5e-4)
    evidence("intruder", kind="closed form", peer="definition", error=error)


def test_unchanged_and_strengthened_weights_have_none():
    w = matrix(12, 8, 0)
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    assert int(intruder(w, w).number) == 0
    assert int(intruder(w, w + 7 * torch.outer(u[:, 0], vh[0]), epsilon=0.999).number) == 0
    assert torch.allclose(intruder(w, w).cosines, torch.ones(8, dtype=torch.float64))
    assert torch.equal(repair_intruders(w, w), w)


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 12), st.integers(3, 12), st.integers(0, 1000))
def test_invariance_to_sign_and_right_rotation(m, n, seed):
    base, tuned = matrix(m, n, seed), matrix(m, n, seed + 1)
    a = intruder(base, tuned, epsilon=0.7)
    q = random_orthonormal(n, n, torch.Generator().manual_seed(seed), torch.float64)
    b = intruder(-base @ q, -tuned @ q, epsilon=0.7)
    assert torch.allclose(a.cosines, b.cosines, atol=1e-6)
    assert bool((a.number <= intruder(base, tuned, epsilon=0.9).number).all())


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 12), st.integers(3, 12), st.integers(0, 1000))
def test_cosines_by_definition(m, n, seed):
    base, tuned = matrix(m, n, seed), matrix(m, n, seed + 1)
    u0, u = (torch.linalg.svd(x, full_matrices=False)[0] for x in (base, tuned))
    assert torch.allclose(intruder(base, tuned, top_k=3).cosines, (u[:, :3].mT @ u0).abs().amax(-1), atol=1e-6)


def test_batches_and_zero_matrices():
    base, tuned = matrix(6, 5, 1), matrix(6, 5, 2)
    both = intruder(torch.stack([base, base]), torch.stack([tuned, base]), top_k=4)
    assert torch.allclose(both.cosines[0], intruder(base, tuned, top_k=4).cosines)
    assert both.number.tolist() == [int(intruder(base, tuned, top_k=4).number), 0]
    assert int(intruder(base, torch.zeros_like(base)).number) == 0
    assert int(intruder(torch.zeros_like(base), base).number) == 5  # nothing to resemble


def test_equal_singular_values_are_compared_as_a_subspace():
    """W₀ = I: any vector is a singular vector of it, but an SVD names only one basis."""
    base = torch.eye(6, dtype=torch.float64)
    tuned = base + 3 * torch.ones(6, 6, dtype=torch.float64) / 6
    assert int(intruder(base, tuned, epsilon=0.5).number) >= 1
    assert int(intruder(base, tuned, epsilon=0.5, degeneracy=0.01).number) == 0


def test_repair_scales_the_intruder_alone():
    base, tuned = example()
    u = torch.linalg.eigh(tuned).eigenvectors[:, -1]
    top = torch.linalg.eigvalsh(tuned)[-1]
    for keep in (0.0, 0.75, 1.0):
        expected = tuned + (keep - 1) * top * torch.outer(u, u)
        assert torch.allclose(repair_intruders(base, tuned, keep=keep), expected, atol=1e-12)
    half = repair_intruders(base.bfloat16(), tuned.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parity
def test_repair_equals_peft(evidence):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16, dtype=torch.float64), nn.Linear(16, 20, dtype=torch.float64))
    bases = [copy.deepcopy(layer.weight.data) for layer in net]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1"], init_lora_weights=False)
    model = peft.get_peft_model(net, config)
    layers = [model.base_model.model[i] for i in range(2)]
    for layer in layers:  # one strong, one weak: an intruder in the first alone
        layer.lora_B["default"].weight.data *= 8.0 if layer is layers[0] else 0.01
    old = [(x.lora_A["default"].weight.data.double(), x.lora_B["default"].weight.data.double()) for x in layers]
    reduce_intruder_dimension(model, mitigation_lambda=0.6, logging_sink=None)
    for i, (layer, base, (a, b)) in enumerate(zip(layers, bases, old, strict=True)):
        ours = repair_lora(base, a, b, scaling=2.0, keep=0.6)
        changed = ours[0] is not a
        assert changed == (i == 0)
        theirs = layer.lora_B["intruder_reduced"].weight.data @ layer.lora_A["intruder_reduced"].weight.data
        error = float((ours[1] @ ours[0] - theirs.double()).abs().max() / theirs.abs().max())
        assert error < TOLERANCES["inspect-repair"][0]
        evidence("intruder", kind="parity", peer=f"peft {peft.__version__}", error=error)


def test_bad_options():
    base, tuned = example()
    for call, text in [
        (lambda: intruder(base, tuned[:4]), "shape"),
        (lambda: intruder(base, tuned, top_k=0), "top_k"),
        (lambda: intruder(base, tuned, epsilon=1.5), "epsilon"),
        (lambda: intruder(base, tuned, degeneracy=-1), "degeneracy"),
        (lambda: repair_intruders(base, tuned, keep=1.2), "keep"),
        (lambda: RankMe(eps=-1), "eps"),
        (lambda: rankme(torch.ones(3)), r"\[N, K\]"),
        (lambda: RankMe().update(torch.eye(3)).update(torch.eye(4)), "one size"),
    ]:
        with pytest.raises(OptionError, match=text):
            call()
    with pytest.raises(NonFiniteError):
        intruder(base * float("nan"), tuned)
    with pytest.raises(NonFiniteError):
        rankme(torch.full((3, 3), float("inf")))
    with pytest.raises(DataError):
        RankMe().compute()


def test_rankme_closed_forms(evidence):
    cases = [
        (torch.eye(4), 4.0),
        (torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0])), 2 * 3**0.5),
        (torch.outer(torch.ones(9), torch.arange(1.0, 6.0)), 1.0),
    ]
    for z, value in cases:
        error = abs(rankme(z) - value)
        assert error < 5e-5  # the ε inside p shifts the value by about ε log(1/ε) per direction
        evidence("rankme", kind="closed form", peer="definition", error=error)
    assert rankme(torch.zeros(5, 3)) == 0.0
    assert rankme(torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0])), eps=0.0) == pytest.approx(2 * 3**0.5, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 1000))
def test_rankme_by_definition_streams_and_rotations(count, k, seed):
    z = matrix(count, k, seed)
    s = torch.linalg.svdvals(z)
    p = s / s.sum() + 1e-7
    expected = float((-(p * p.log()).sum()).exp())
    assert rankme(z) == pytest.approx(expected, abs=1e-6)
    assert rankme(1e4 * z) == pytest.approx(expected, abs=1e-6)
    q = random_orthonormal(k, k, torch.Generator().manual_seed(seed), torch.float64)
    assert rankme(z @ q) == pytest.approx(expected, abs=1e-6)
    one, two = RankMe().update(z[: count // 2]), RankMe().update(z[count // 2 :])
    assert one.merge(two).compute() == pytest.approx(expected, abs=1e-6)
