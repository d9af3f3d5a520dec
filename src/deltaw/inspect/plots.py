"""Figures of an inspection: spectra of ΔW by depth, and where the intruder dimensions sit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaw.inspect.inspection import Inspection


def plot_spectra(found: Inspection, path: Path) -> Path:
    """One panel per role: singular values of ΔW (solid, coloured by depth) on a logarithmic scale."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    roles = list(dict.fromkeys(r["role"] for r in found.rows))
    columns = min(3, len(roles))
    lines = math.ceil(len(roles) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    depths = [r["depth"] or 0 for r in found.rows]
    scale = mpl.colors.Normalize(min(depths), max(*depths, min(depths) + 1))
    colours = mpl.colormaps["viridis"]
    for panel, role in zip(panels, roles, strict=False):
        top = max((r["spectral"] for r in found.rows if r["role"] == role), default=0.0)
        for r in found.rows:
            # Below 1e-6 of the largest is rounding of the stored weights, not change.
            values = [s for s in r["singular_values"] if s > 1e-6 * top]
            if r["role"] == role and values:
                panel.semilogy(range(1, len(values) + 1), values, color=colours(scale(r["depth"] or 0)), linewidth=1.2)
        if top == 0:
            panel.text(0.5, 0.5, "unchanged", ha="center", va="center", transform=panel.transAxes)
        panel.set_title(role)
        panel.set_xlabel("index")
        panel.grid(alpha=0.3)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    for panel in panels[::columns]:
        panel.set_ylabel("singular value of ΔW")
    for panel in panels[len(roles) :]:
        panel.set_visible(False)
    if max(depths) > min(depths):
        figure.colorbar(mpl.cm.ScalarMappable(scale, colours), ax=list(panels[: len(roles)]), label="layer")
    figure.suptitle(f"What changed: {_short(found.tuned)} against {_short(found.base)}")
    figure.savefig(path, dpi=150)
    return path


def plot_intruders(found: Inspection, path: Path) -> Path:
    """Intruder dimensions per layer, stacked by role."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    roles = list(dict.fromkeys(r["role"] for r in found.rows))
    places = sorted({r["depth"] for r in found.rows}, key=lambda d: (d is None, d))
    labels = ["other" if d is None else str(d) for d in places]
    figure = Figure(figsize=(max(5.0, 0.35 * len(places) + 3.0), 3.6), layout="constrained")
    panel: Any = figure.subplots()
    floor = [0] * len(places)
    for role in roles:
        counts = [sum(r["intruders"] for r in found.rows if r["role"] == role and r["depth"] == d) for d in places]
        panel.bar(labels, counts, bottom=floor, label=role)
        floor = [a + b for a, b in zip(floor, counts, strict=True)]
    panel.set_ylim(0, max(1, *floor) * 1.1)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    if len(labels) > 16:  # thin the ticks rather than let them run into each other
        panel.set_xticks(range(0, len(labels), math.ceil(len(labels) / 16)))
    panel.set_xlabel("layer")
    panel.set_ylabel("intruder dimensions")
    k, epsilon = found.options["top_k"], found.options["epsilon"]
    panel.set_title(f"{sum(floor)} intruder dimensions (top {k} vectors, cosine < {epsilon:g})")
    panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
    return path


def _short(label: str) -> str:
    return label.rstrip("/").rsplit("/", 1)[-1]
