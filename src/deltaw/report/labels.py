"""Labels written beside the points of a plot, where they cover the least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: offsets in px with their alignment, dearest last: beside, above and below, diagonal, further away
_OFFSETS = [
    (10, 0, "left", "center"),
    (-10, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
]
_OFFSETS += [
    (9 * side, s * d, "left" if side > 0 else "right", "center")
    for d in (12, 26, 40)
    for s in (1, -1)
    for side in (1, -1)
]
#: how far the box of a text lies from its anchor, in shares of its own width and height
_SHIFT = {"left": 0.0, "right": -1.0, "center": -0.5, "bottom": 0.0, "top": -1.0}


def place(ax: Any, labels: Sequence[tuple[float, float, str, str]], taken: Sequence[Any] = ()) -> None:
    """Write each (x, y, text, colour); `taken` are boxes in px that should stay free. Needs a settled layout."""
    from matplotlib.transforms import Bbox

    renderer = ax.figure.canvas.get_renderer()
    frame = ax.get_window_extent(renderer)
    points = [ax.transData.transform((x, y)) for x, y, *_ in labels]
    boxes = [*(Bbox([p - 6, p + 6]) for p in points), *taken]
    for (x, y, text, color), (px, py) in zip(labels, points, strict=True):
        note = ax.annotate(text, (x, y), (0, 0), textcoords="offset points", color=color)
        size = note.get_window_extent(renderer)
        tried = []
        for number, (dx, dy, ha, va) in enumerate(_OFFSETS):
            left, bottom = px + dx + _SHIFT[ha] * size.width, py + dy + _SHIFT[va] * size.height
            box = Bbox.from_bounds(left - 1, bottom - 1, size.width + 2, size.height + 2)
            outside = box.width * box.height - overlap(box, frame)
            tried.append((sum(overlap(box, b) for b in boxes) + 4 * outside + number, number, box))
        _, number, box = min(tried, key=lambda t: t[:2])
        dx, dy, ha, va = _OFFSETS[number]
        note.set(position=(dx, dy), ha=ha, va=va)
        boxes.append(box)


def overlap(a: Any, b: Any) -> float:
    """The area in which two boxes overlap."""
    w, h = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return w * h if w > 0 and h > 0 else 0.0
