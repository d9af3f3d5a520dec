"""Which layer gets which share of one parameter budget.

A plan knows nothing of ranks: every layer offers a menu of choices (rank 1, 2, 3, … or any other ladder), each
with a cost in parameters and, where the allocation asks for it, a squared error in the method's own norm; the
dense layer (cost m*n, error 0) is always on the menu. The plan picks one entry per layer within the budget.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.errors import OptionError

ALLOCATIONS = ("uniform", "energy", "loss")
#: (layer, its choice, the next choice) -> the smaller, the sooner
Priority = Callable[[int, int, int | None], float]


@dataclass(frozen=True)
class Menu:
    """What one layer can become.

    Attributes:
        name: the layer, for messages.
        dense: parameters of the layer as it is (error 0).
        costs: parameters of each choice, increasing; choices that cost `dense` or more are left out.
        errors: squared error of each choice in the method's own norm, non-increasing; None where not known.
        scale: squared norm of the layer's output in the same norm; "energy" divides by it.
    """

    name: str
    dense: int
    costs: Sequence[int]
    errors: Sequence[float] | None = None
    scale: float = 1.0

    def cost(self, choice: int | None) -> int:
        """Parameters of a choice; None is the dense layer."""
        return self.dense if choice is None else self.costs[choice]

    def error(self, choice: int | None) -> float:
        """Squared error of a choice."""
        return 0.0 if choice is None or self.errors is None else float(self.errors[choice])


def budget_of(menus: Sequence[Menu], ratio: float) -> int:
    """Parameters that may be kept: floor(ratio * sum of the dense counts).

    Raises:
        OptionError: `ratio` is not in (0, 1], or even the smallest choice of every layer exceeds the budget.
    """
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise OptionError(
            f"ratio is the share of parameters that is kept and must lie in (0, 1], found {ratio!r}; "
            "0.6 keeps 60 % of the targeted layers"
        )
    total = sum(m.dense for m in menus)
    budget = int(ratio * total + 1e-9)  # 0.6 * 1000 is 599.99… in binary
    least = sum(min([m.dense, *m.costs[:1]]) for m in menus)
    if budget < least:
        raise OptionError(
            f"ratio {ratio:g} leaves {budget} of {total} parameters, but the smallest rank of every layer needs "
            f"{least}: use a ratio of at least {least / total:.4f} or exclude layers"
        )
    return budget


def allocate(menus: Sequence[Menu], ratio: float, allocation: str = "uniform", floor: float = 0.5) -> list[int | None]:
    """The choice of every layer (index into its menu, None for dense) under one budget, which is never exceeded.

    "uniform" gives every layer the largest choice within its own `ratio * dense` and hands what is left, step by
    step, to the layers furthest below their share. "loss" lowers the sum of squared errors, "energy" the sum of
    squared errors relative to each layer's own scale: from the smallest choices upwards, always the step with the
    largest decrease per parameter. As steps the corners of each layer's lower convex hull are taken, so that a
    layer whose last step (to dense) pays best is not stopped by the poor steps before it. As layers are judged one by
    one while their errors multiply through the network, no layer is starved: "energy" and "loss" start at `floor` of
    the uniform share of each (0: at the smallest choice).
    """
    if not 0 <= floor <= 1:
        raise OptionError(f"floor={floor} is a part of the uniform share; expected a number in [0, 1]")
    if allocation not in ALLOCATIONS:
        raise OptionError(f"allocation {allocation!r} is not known; choose one of {', '.join(ALLOCATIONS)}")
    budget = budget_of(menus, ratio)
    if budget == sum(m.dense for m in menus):
        return [None] * len(menus)
    if allocation != "uniform":
        return _greedy(menus, budget, allocation, _shares(menus, floor * ratio, budget))
    picks = _shares(menus, ratio, budget)
    left = budget - sum(m.cost(p) for m, p in zip(menus, picks, strict=True))
    _spend(menus, picks, left, lambda i, p, step: menus[i].cost(p) / menus[i].dense)
    return picks


def _shares(menus: Sequence[Menu], ratio: float, budget: int) -> list[int | None]:
    """Every layer's largest choice within `ratio * dense`, or its smallest one, together within the budget."""
    picks: list[int | None] = []
    for m in menus:
        fitting = sum(c <= ratio * m.dense + 1e-9 for c in m.costs)
        picks.append(max(fitting - 1, 0) if m.costs else None)
    spent = sum(m.cost(p) for m, p in zip(menus, picks, strict=True))
    while spent > budget:  # layers that cannot go below their smallest choice overdraw: the largest others pay
        _, i, p = max((menus[i].cost(p) / menus[i].dense, i, p) for i, p in enumerate(picks) if p)
        spent -= menus[i].cost(p) - menus[i].cost(p - 1)
        picks[i] = p - 1
    return picks


def _spend(menus: Sequence[Menu], picks: list[int | None], left: int, priority: Priority) -> None:
    """Hand out what is left in single steps, smallest `priority(layer, from, to)` first, until nothing fits."""
    heap: list[tuple[float, int, int | None]] = []

    def offer(i: int) -> None:
        p = picks[i]
        if p is not None:
            step = p + 1 if p + 1 < len(menus[i].costs) else None
            heapq.heappush(heap, (priority(i, p, step), i, step))

    for i in range(len(menus)):
        offer(i)
    while heap:
        _, i, step = heapq.heappop(heap)
        price = menus[i].cost(step) - menus[i].cost(picks[i])
        if price <= left:  # a layer whose next step does not fit any more is done: the budget only shrinks
            picks[i], left = step, left - price
            offer(i)


def _greedy(menus: Sequence[Menu], budget: int, allocation: str, start: Sequence[int | None]) -> list[int | None]:
    picks = list(start)
    left = budget - sum(m.cost(p) for m, p in zip(menus, picks, strict=True))
    weights = []
    for m in menus:
        if m.costs and m.errors is None:
            raise OptionError(f"allocation {allocation!r} needs the errors of layer {m.name!r}")
        weights.append(1.0 if allocation == "loss" else 1.0 / m.scale if m.scale > 0 else 0.0)
    steps = [
        (-w * slope, i, a, b)
        for i, (m, w) in enumerate(zip(menus, weights, strict=True))
        for a, b, slope in _hull(m, start[i])
    ]
    for _, i, a, b in sorted(steps, key=lambda s: s[:3]):
        price = menus[i].cost(b) - menus[i].cost(a)
        if picks[i] == a and price <= left:
            picks[i], left = b, left - price

    def per_parameter(i: int, p: int, step: int | None) -> float:
        gain = menus[i].error(p) - menus[i].error(step)
        return -weights[i] * gain / (menus[i].cost(step) - menus[i].cost(p))

    _spend(menus, picks, left, per_parameter)  # a long step that no longer fits leaves room for short ones
    return picks


def _hull(menu: Menu, start: int | None) -> list[tuple[int, int | None, float]]:
    """Corners of the lower convex hull of (cost, error) from `start` on: (from, to, decrease of error per parameter)."""
    if start is None:
        return []
    points: list[tuple[int, float, Any]] = [
        (c, float(e), i) for i, (c, e) in enumerate(zip(menu.costs, menu.errors or (), strict=True)) if i >= start
    ]
    points.append((menu.dense, 0.0, None))
    hull: list[tuple[int, float, Any]] = []
    for x, y, i in points:
        while len(hull) > 1:
            (x0, y0, _), (x1, y1, _) = hull[-2:]
            if (y0 - y1) * (x - x1) > (y1 - y) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y, i))
    return [(a[2], b[2], (a[1] - b[1]) / (b[0] - a[0])) for a, b in itertools.pairwise(hull)]
