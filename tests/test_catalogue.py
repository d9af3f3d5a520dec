"""The catalogue: cards are found, complete, and their formulas compute."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw import catalogue
from deltaw.errors import DeltawError, OptionError, UnknownNameError


def test_every_card_is_complete():
    cards = catalogue.cards()
    assert {c.family for c in cards} == set(catalogue.FAMILIES)
    for card in cards:
        assert card.title, card.id
        assert card.summary, card.id
        assert card.paper, card.id
        json.dumps(card.as_dict())
        assert card.status in ("parity", "closed form", "paper only", "unverified")


def test_lookup_by_alias_and_nearest_name():
    assert catalogue.get("task_arithmetic").id == "task-arithmetic"
    with pytest.raises(UnknownNameError, match="did you mean 'lora'"):
        catalogue.get("lorra")
    with pytest.raises(UnknownNameError, match="adapters method"):
        catalogue.get("ties", family="adapters")
    with pytest.raises(UnknownNameError, match="'merge'"):
        catalogue.cards(family="merg")
    with pytest.raises(UnknownNameError, match="option of method 'ties'"):
        catalogue.check_options(catalogue.get("ties"), {"densitty": 0.2})


def test_two_methods_cannot_share_an_id():
    with pytest.raises(DeltawError, match="already taken"):
        catalogue.method("lora", family="merge", paper="-", title="-", summary="-")(lambda: None)


def test_rates_far_outside_the_range_warn():
    card = catalogue.get("lora")
    assert card.lr_range is not None
    assert card.check_lr(card.default_lr) is None
    assert "learning rate" in card.check_lr(card.lr_range[1] * 100)


@settings(deadline=None, max_examples=50)
@given(m=st.integers(1, 4096), n=st.integers(1, 4096), r=st.integers(1, 64))
def test_formulas(m: int, n: int, r: int):
    value = catalogue.evaluate_formula
    assert value("r*(m+n)", m=m, n=n, r=r) == r * (m + n)
    assert value("rank*(m+n)", m=m, n=n, r=r) == r * (m + n)
    assert value("min(m,n)//r if r > 1 else max(m, n)**2", m=m, n=n, r=r) == (
        min(m, n) // r if r > 1 else max(m, n) ** 2
    )


@pytest.mark.parametrize("formula", ["__import__('os')", "m.__class__", "[1]", "q + 1", "(lambda: 1)()"])
def test_formulas_are_arithmetic_only(formula: str):
    with pytest.raises(OptionError):
        catalogue.evaluate_formula(formula, m=1)
