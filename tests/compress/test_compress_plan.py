"""The plan: one budget, never exceeded; best where a brute force can tell."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.compress import ALLOCATIONS, Menu, allocate
from deltaw.errors import OptionError


def ladder(m: int, n: int, values: list[float] | None = None, name: str = "layer", extra: int = 0) -> Menu:
    """The menu of a low-rank layer with the given singular values."""
    q = min(m, n)
    costs = [r * (m + n) + extra for r in range(1, q + 1) if r * (m + n) + extra < m * n]
    values = sorted(values or [1.0] * q, reverse=True)
    errors = [sum(v * v for v in values[r:]) for r in range(1, len(costs) + 1)]
    return Menu(name, m * n, costs, errors, sum(v * v for v in values))


shapes = st.tuples(st.integers(2, 24), st.integers(2, 24))


@settings(max_examples=80, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=6), st.floats(0.05, 1.0), st.sampled_from(ALLOCATIONS), st.randoms())
def test_budget_is_never_exceeded(sizes, ratio, allocation, random):
    menus = [ladder(m, n, [random.expovariate(1) for _ in range(min(m, n))]) for m, n in sizes]
    total = sum(m.dense for m in menus)
    least = sum(min([m.dense, *m.costs[:1]]) for m in menus)
    if least > int(ratio * total + 1e-9):
        with pytest.raises(OptionError, match="at least"):
            allocate(menus, ratio, allocation)
        return
    picks = allocate(menus, ratio, allocation)
    spent = sum(m.cost(p) for m, p in zip(menus, picks, strict=True))
    budget = int(ratio * sum(m.dense for m in menus) + 1e-9)
    assert spent <= budget
    for m, p in zip(menus, picks, strict=True):  # nothing that would still fit is left on the table
        if p is not None:
            step = p + 1 if p + 1 < len(m.costs) else None
            assert spent + m.cost(step) - m.cost(p) > budget


def test_uniform_is_the_floor_formula_with_the_rest_distributed():
    menus = [ladder(384, 384), ladder(1536, 384), ladder(384, 1536)]
    picks = allocate(menus, 0.6, "uniform")
    ranks = [p + 1 for p in picks]
    floors = [int(0.6 * 384 * 384 / 768), int(0.6 * 1536 * 384 / 1920), int(0.6 * 1536 * 384 / 1920)]
    assert all(0 <= r - f <= 2 for r, f in zip(ranks, floors, strict=True))
    assert sum(r - f for r, f in zip(ranks, floors, strict=True)) >= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 1.0), min_size=12, max_size=12), st.floats(0.45, 0.95))
def test_loss_is_close_to_the_best_of_all_plans(spectrum, ratio):
    """Within one step of the optimum that enumeration finds: the greedy's only loss is the last step that does not fit."""
    menus = [ladder(8, 4, spectrum[:4]), ladder(4, 8, spectrum[4:8]), ladder(6, 4, spectrum[8:])]
    picks = allocate(menus, ratio, "loss", floor=0)
    budget = int(ratio * sum(m.dense for m in menus) + 1e-9)
    options = [[*range(len(m.costs)), None] for m in menus]
    best = min(
        sum(m.error(p) for m, p in zip(menus, plan, strict=True))
        for plan in itertools.product(*options)
        if sum(m.cost(p) for m, p in zip(menus, plan, strict=True)) <= budget
    )
    reached = sum(m.error(p) for m, p in zip(menus, picks, strict=True))
    worst_step = max(m.error(0) for m in menus)
    assert best - 1e-12 <= reached <= best + worst_step


def test_loss_beats_uniform_where_one_layer_is_easy():
    hard = ladder(40, 40, [1.0] * 40, "hard")
    easy = ladder(40, 40, [1.0] * 4 + [1e-4] * 36, "easy")
    uniform, loss = allocate([hard, easy], 0.6, "uniform"), allocate([hard, easy], 0.6, "loss", floor=0)
    error = lambda picks: sum(m.error(p) for m, p in zip([hard, easy], picks, strict=True))  # noqa: E731
    assert error(loss) < 0.5 * error(uniform)
    assert loss[0] is None  # the hard one is worth keeping whole


def test_floor_keeps_every_layer_at_its_part_of_the_uniform_share():
    hard, easy = ladder(40, 40, [1.0] * 40, "hard"), ladder(40, 40, [1e-3] * 4 + [1e-5] * 36, "easy")
    ranks = {f: allocate([hard, easy], 0.6, "loss", floor=f)[1] + 1 for f in (0.0, 0.5, 1.0)}
    assert ranks[0.0] < ranks[0.5] < ranks[1.0]
    assert ranks[0.5] >= int(0.5 * 0.6 * 40 * 40 / 80)
    with pytest.raises(OptionError, match="floor"):
        allocate([hard, easy], 0.6, "loss", floor=1.5)


def test_energy_does_not_see_the_scale_of_a_layer():
    a, b = ladder(20, 20, [2.0**-i for i in range(20)]), ladder(20, 20, [1e3 * 2.0**-i for i in range(20)])
    energy = allocate([a, b], 0.5, "energy")
    assert abs(energy[0] - energy[1]) <= 1
    loss = allocate([a, b], 0.5, "loss")
    assert loss[1] > loss[0]


def test_ratio_one_keeps_everything():
    assert allocate([ladder(9, 7), ladder(5, 5)], 1.0) == [None, None]


def test_a_layer_without_choices_stays_dense_and_is_paid_for():
    picks = allocate([Menu("tied", 100, ()), ladder(20, 20)], 0.6)
    assert picks[0] is None
    assert 100 + (picks[1] + 1) * 40 <= 300


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), True, "0.5"])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(OptionError, match="ratio"):
        allocate([ladder(4, 4)], ratio)


def test_unknown_allocation_and_a_ratio_too_small():
    with pytest.raises(OptionError, match="allocation"):
        allocate([ladder(8, 8)], 0.5, "even")
    with pytest.raises(OptionError, match=r"ratio of at least 0\.2"):
        allocate([ladder(8, 8)], 0.1)
