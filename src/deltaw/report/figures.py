"""The figures of the report: which numbers of a run go into which plot, and what each shows in words."""

from __future__ import annotations

from collections.abc import Sequence

from deltaw.report import format as f
from deltaw.report.plots import Figure, Style, bars, curves, figure, forest, scatter, styles
from deltaw.report.results import CEILING, DENSE, PROBE, REFERENCES, Results
from deltaw.report.spectra import FLOOR, Spectra, by_layer, changes, curve, per_method
from deltaw.report.statistics import Interval


def _style(results: Results, stage: str, spectra: Spectra | None = None) -> dict[str, Style]:
    """One colour per method; those of `adapt` keep theirs in `inspect`."""
    methods = results.methods(stage)
    if spectra is not None:
        methods = list(dict.fromkeys([*results.methods("adapt"), *results.methods("merge"), *spectra]))
    return styles(methods, REFERENCES)


def _pooled(results: Results, stage: str) -> str:
    domains = results.domains(stage)
    return domains[0] if len(domains) == 1 else "mean"


def _accuracies(results: Results, stage: str) -> list[tuple[str, Interval]]:
    found = [(m, results.accuracy(stage, m, _pooled(results, stage))) for m in results.methods(stage)]
    return [(m, i.scaled(100)) for m, i in found if i is not None]


def _say(rows: Sequence[tuple[str, Interval]], unit: str = " %") -> str:
    return "; ".join(f"{m} {i.value:.1f}{unit}" for m, i in rows)


def accuracy_by_parameters(results: Results) -> Figure | None:
    """Mean accuracy against trainable parameters, on a logarithmic axis."""
    costs = {m: results.get("adapt", m, "trainable_params") for m in results.methods("adapt")}
    points = [(m, c.value, i) for m, i in _accuracies(results, "adapt") if (c := costs[m]) is not None and c.value > 0]
    if len(points) < 2:
        return None
    style = _style(results, "adapt")
    return figure(
        "adapt-accuracy", "Accuracy against trainable parameters",
        "Mean accuracy over the domains with its 95 % interval; parameters trained per domain on a logarithmic axis. "
        "The intervals are of each model alone; the paired differences to the probe are sharper.",
        "; ".join(f"{m}: {f.count(x)} parameters, {i.value:.1f} %" for m, x, i in points),
        lambda c, narrow: scatter(c, points, style, xlabel="trainable parameters", ylabel="mean accuracy, %", log=True, ticks=f.count),
        330,
    )  # fmt: skip


def gains(results: Results, stage: str) -> Figure | None:
    """Gain over the linear probe per method: interval of the mean, small marks for single domains."""
    rows = []
    for m in results.candidates(stage):
        gain = results.gain(stage, m, _pooled(results, stage))
        if gain is not None:
            parts = [results.gain(stage, m, d) for d in results.domains(stage)]
            rows.append((m, gain.scaled(100), [100 * p.value for p in parts if p is not None]))
    if not rows:
        return None
    rows.sort(key=lambda r: -r[1].value)
    style = _style(results, stage)
    return figure(
        f"{stage}-gain", "Gain over the linear probe",
        "Difference to the linear probe in percentage points: mean over the domains with the 95 % interval of the "
        "paired bootstrap; thin marks are the single domains. An interval that reaches the line is a tie.",
        _say([(m, i) for m, i, _ in rows], " points"),
        lambda c, narrow: forest(c, rows, style, xlabel="points of accuracy", lines=[(0.0, "linear probe")],
                                 text=f.signed, narrow=narrow),
        90 + 42 * len(rows),
    )  # fmt: skip


def merge_accuracy(results: Results) -> Figure | None:
    """Mean accuracy of the merged models between the linear probe and the single-task ceiling."""
    known = dict(_accuracies(results, "merge"))
    domains = results.domains("merge")
    probe = results.probe("merge")
    lines = []
    if probe is not None and (i := results.accuracy(*probe, _pooled(results, "merge"))) is not None:
        lines.append((100 * i.value, PROBE))
    if CEILING in known:
        lines.append((known[CEILING].value, CEILING))
    rows = []
    for m in results.candidates("merge"):
        parts = [results.accuracy("merge", m, d) for d in domains]
        if m in known:
            rows.append((m, known[m], [100 * p.value for p in parts if p is not None]))
    if not rows:
        return None
    rows.sort(key=lambda r: -r[1].value)
    style = _style(results, "merge")
    return figure(
        "merge-accuracy", "One merged model against its yardsticks",
        "Mean accuracy over the domains with its 95 % interval; thin marks are the single domains. The dashed lines "
        "are the linear probe and the single-task models, one per domain.",
        _say([*((m, i) for m, i, _ in rows), *((name, Interval(x)) for x, name in lines)]),
        lambda c, narrow: forest(c, rows, style, xlabel="accuracy, %", lines=lines, text=lambda v: f"{v:.1f}"),
        105 + 42 * len(rows),
    )  # fmt: skip


def accuracy_by_size(results: Results) -> Figure | None:
    """Accuracy against bytes of the compressed models."""
    sizes = {m: results.get("compress", m, "size_bytes") for m in results.methods("compress")}
    points = [(m, s.value / 1e6, i) for m, i in _accuracies(results, "compress") if (s := sizes[m]) is not None]
    if len(points) < 2:
        return None
    style = _style(results, "compress")
    return figure(
        "compress-size", "Accuracy against size",
        "Mean accuracy with its 95 % interval against the size on disk. Up and to the left is better.",
        "; ".join(f"{m}: {x:.1f} MB, {i.value:.1f} %" for m, x, i in points),
        lambda c, narrow: scatter(c, points, style, xlabel="size on disk, MB", ylabel="mean accuracy, %"),
        320,
    )  # fmt: skip


def latency(results: Results) -> Figure | None:
    """Latency at each batch size, one panel each."""
    methods = [m for m in results.methods("compress") if m != PROBE]
    panels = []
    for batch in results.batches("compress"):
        rows = [(m, i) for m in methods if (i := results.get("compress", m, "latency_ms", batch=batch)) is not None]
        if rows:
            panels.append((f"batch {batch}", rows))
    if not panels:
        return None
    style = _style(results, "compress")
    tallest = max(len(rows) for _, rows in panels)
    return figure(
        "compress-latency", "Latency",
        f"Milliseconds per forward pass; shorter is better, {DENSE} is the uncompressed model.",
        ". ".join(f"{title}: " + "; ".join(f"{m} {f.number(i.value)} ms" for m, i in rows) for title, rows in panels),
        lambda c, narrow: bars(c, panels, style, xlabel="ms", text=f.number, narrow=narrow),
        max(110 + 44 * tallest, 60 + len(panels) * (60 + 26 * tallest)),
    )  # fmt: skip


def spectra_of_change(results: Results, spectra: Spectra) -> Figure | None:
    """Normalised singular values of ΔW per method."""
    series = [(m, *c) for m in spectra if len((c := curve(spectra, m))[0])]
    if not series:
        return None
    style = _style(results, "inspect", spectra)
    return figure(
        "inspect-spectra", "Spectra of ΔW",
        "Singular values of ΔW divided by the largest, in order: median over all matrices, band from the 10th to the "
        f"90th percentile, cut at {FLOOR:g}. A steep line is a change of low rank, a flat one moves every direction.",
        "; ".join(f"{m}: {len(x)} directions above {FLOOR:g} of the largest" for m, x, *_ in series),
        lambda c, narrow: curves(c, series, style, xlabel="index of the singular value", ylabel="σᵢ / σ₁", logx=True, logy=True),
        340,
    )  # fmt: skip


def ranks_by_layer(results: Results, spectra: Spectra) -> Figure | None:
    """Effective rank of ΔW by layer per method."""
    series = []
    for m in spectra:
        layers = by_layer(spectra, m)
        if len(layers) > 1:
            middle, low, high = (list(x) for x in zip(*layers.values(), strict=True))
            series.append((m, list(layers), middle, low, high))
    if not series:
        return None
    style = _style(results, "inspect", spectra)
    return figure(
        "inspect-layers", "Effective rank of ΔW by layer",
        "Median over the matrices of a layer and the domains, band from the 10th to the 90th percentile.",
        "; ".join(f"{m}: {min(y):.0f} to {max(y):.0f}" for m, _, y, _, _ in series),
        lambda c, narrow: curves(c, series, style, xlabel="layer", ylabel="effective rank", logy=True, integer=True, markers=True),
        340,
    )  # fmt: skip


def intruders(results: Results, spectra: Spectra) -> Figure | None:
    """Intruder dimensions per model; None where no method made any."""
    means = per_method(spectra, lambda c: c.intruders)
    if not any(means.values()):
        return None
    marks = {m: [float(c.intruders) for c in changes(spectra) if c.method == m] for m in means}
    rows = [(m, Interval(v)) for m, v in sorted(means.items(), key=lambda p: -p[1])]
    style = _style(results, "inspect", spectra)
    return figure(
        "inspect-intruders", "Intruder dimensions",
        "Per tuned model, all matrices together: mean over the domains, thin marks are the single domains. An intruder "
        "is a leading singular direction that resembles none of the base's; they go with forgetting.",
        _say(rows, ""),
        lambda c, narrow: bars(c, [("", rows)], style, xlabel="intruders per model", text=f.number, narrow=narrow, marks=marks),
        90 + 38 * len(rows),
    )  # fmt: skip


def distance(results: Results, spectra: Spectra) -> Figure | None:
    """Relative norm of ΔW per method, in percent of the base."""
    means = per_method(spectra, lambda c: 100 * c.relative_norm)
    if not any(means.values()):
        return None
    marks = {m: [100 * c.relative_norm for c in changes(spectra) if c.method == m] for m in means}
    rows = [(m, Interval(v)) for m, v in sorted(means.items(), key=lambda p: -p[1])]
    style = _style(results, "inspect", spectra)
    return figure(
        "inspect-distance", "How far the weights moved",
        "‖ΔW‖ in percent of ‖W‖ (Frobenius), median over the matrices: mean over the domains, thin marks are the "
        "single domains.",
        "; ".join(f"{m} {f.number(i.value)} %" for m, i in rows),
        lambda c, narrow: bars(c, [("", rows)], style, xlabel="% of the base", text=f.number, narrow=narrow, marks=marks),
        90 + 38 * len(rows),
    )  # fmt: skip


def figures(results: Results, spectra: Spectra) -> dict[str, list[Figure]]:
    """{stage: figures}, those for which the run has numbers."""
    made = {
        "adapt": [accuracy_by_parameters(results), gains(results, "adapt")],
        "merge": [merge_accuracy(results), gains(results, "merge")],
        "compress": [accuracy_by_size(results), latency(results)],
        "inspect": [make(results, spectra) for make in (spectra_of_change, ranks_by_layer, distance, intruders)],
    }
    return {stage: [x for x in found if x is not None] for stage, found in made.items()}
