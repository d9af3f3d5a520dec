"""The stages of the pipeline: each asks for its cells and turns what they found into rows."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from deltaw.recipes import work
from deltaw.recipes.cells import Cell, Cells, Job, fingerprint
from deltaw.recipes.context import Context
from deltaw.recipes.schema import PROBE

#: {name of the adaptation: {domain: cell}}
Adapted = dict[str, dict[str, Cell]]


@dataclass
class Findings:
    """Rows, per-example predictions and spectra of a run, in the order of the stages."""

    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    predictions: dict[str, list[int]] = field(default_factory=dict)
    spectra: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def row(self, stage: str, method: str, domain: str, metric: str, value: float, **more: Any) -> None:
        """Add one result row."""
        row = {"stage": stage, "method": method, "domain": domain, "metric": metric, "value": value, "seed": self.seed}
        self.rows.append({**row, **more})

    def accuracy(self, stage: str, method: str, correct: dict[str, list[int]]) -> None:
        """Rows of accuracy per domain and their mean, and the predictions behind them."""
        shares = []
        for domain, hits in correct.items():
            shares.append(sum(hits) / len(hits))
            self.row(stage, method, domain, "accuracy", shares[-1], n=len(hits))
            self.predictions[f"{stage}/{method}/{domain}"] = hits
        self.row(stage, method, "mean", "accuracy", sum(shares) / len(shares), n=sum(map(len, correct.values())))


def adapt_stage(ctx: Context, cells: Cells, found: Findings) -> Adapted:
    """Every adaptation of the recipe on every domain."""
    if not (ctx.root / "base").exists():
        cells.warm_up()
    (base,) = cells.make(ctx, [ctx.base_job])
    jobs = {}
    for part in ctx.recipe.adapt:
        for d in ctx.domains:
            key = fingerprint(part.model_dump(), base.key, ctx.data_key(d))
            task, arguments = (work.probe, (d,)) if part.method == PROBE else (work.adapt, (part, d))
            jobs[part.name, d] = Job(f"adapt/{part.name}/{d}", key, task, arguments)
    made = dict(zip(jobs, cells.make(ctx, list(jobs.values())), strict=True))
    adapted: Adapted = {p.name: {d: made[p.name, d] for d in ctx.domains} for p in ctx.recipe.adapt}
    for name, by_domain in adapted.items():
        results = {d: c.result for d, c in by_domain.items()}
        found.accuracy("adapt", name, {d: r["correct"] for d, r in results.items()})
        for metric in ("trainable_params", "seconds", "steps"):
            values = {d: r[metric] for d, r in results.items() if metric in r}
            for d, value in values.items():
                found.row("adapt", name, d, metric, value)
            if values:
                found.row("adapt", name, "mean", metric, statistics.mean(values.values()))
    return adapted


def merge_stage(ctx: Context, cells: Cells, found: Findings, adapted: Adapted) -> dict[str, Cell]:
    """Merge the tuned models by every method."""
    assert ctx.recipe.merge is not None
    tuned = adapted[ctx.recipe.merge.models]
    found.accuracy("merge", "single-task", {d: c.result["correct"] for d, c in tuned.items()})
    if PROBE in adapted:
        found.accuracy("merge", PROBE, {d: c.result["correct"] for d, c in adapted[PROBE].items()})
    keys, models = [c.key for c in tuned.values()], [c.folder / "model" for c in tuned.values()]
    parts = ctx.recipe.merge.methods
    jobs = [
        Job(f"merge/{p.method}", fingerprint(p.model_dump(), keys, ctx.data_key(*ctx.domains)), work.merge, (p, models))
        for p in parts
    ]
    merged = {p.method: c for p, c in zip(parts, cells.make(ctx, jobs), strict=True)}
    for method, cell in merged.items():
        found.accuracy("merge", method, cell.result["correct"])
        found.row("merge", method, "all", "seconds", cell.seconds)
        found.row("merge", method, "all", "validation_loss", cell.result["validation_loss"])
        for option, value in cell.result["options"].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found.row("merge", method, "all", option, value)
    return merged


def compress_stage(ctx: Context, cells: Cells, found: Findings, merged: dict[str, Cell]) -> None:
    """Compress the chosen merged model by every method at one budget, and measure size and latency."""
    part = ctx.recipe.compress
    assert part is not None
    best = min(merged, key=lambda m: merged[m].result["validation_loss"])
    source = merged[best if part.model == "best" else part.model]
    options = part.model_dump(exclude={"methods", "model", "latency_batches", "latency_repeats"})
    key = [options, source.key, ctx.data_key(*ctx.domains)]
    jobs = [
        Job(f"compress/{m}", fingerprint(key, m), work.compress, (m, source.folder / "model")) for m in part.methods
    ]
    made = dict(zip(part.methods, cells.make(ctx, jobs), strict=True))
    # Alone, after the others: a latency measured beside another process would be that process's, too.
    models = {"dense": source.folder / "model"} | {m: c.folder / "model" for m, c in made.items()}
    timing = fingerprint([c.key for c in made.values()], part.latency_batches, part.latency_repeats)
    (timed,) = cells.make(ctx, [Job("compress/latency", timing, work.latency, (models,))])
    first = next(iter(made.values())).result
    size = work.weight_bytes(source.folder / "model")
    saved = first["linear_params_before"] - first["linear_params"]
    dense = {
        "correct": source.result["correct"],
        "params": first["params"] + saved,
        "linear_params": first["linear_params_before"],
        "size_bytes": size,
        "dense_size_bytes": size,
    }
    for method, result in {"dense": dense, **{m: c.result for m, c in made.items()}}.items():
        found.accuracy("compress", method, result["correct"])
        for metric in ("params", "linear_params", "size_bytes", "dense_size_bytes"):
            found.row("compress", method, "all", metric, result[metric])
        for batch, milliseconds in timed.result["latency_ms"][method].items():
            found.row("compress", method, "all", "latency_ms", milliseconds, batch=int(batch))


def inspect_stage(ctx: Context, cells: Cells, found: Findings, adapted: Adapted) -> None:
    """Spectra of ΔW, effective ranks and intruder dimensions of every adapted model against the base."""
    part = ctx.recipe.inspect
    assert part is not None
    options = part.model_dump(exclude={"models"})
    jobs = {
        (name, d): Job(f"inspect/{name}/{d}", fingerprint(options, cell.key), work.inspect, (cell.folder / "model",))
        for name in part.models
        for d, cell in adapted[name].items()
    }
    made = cells.make(ctx, list(jobs.values()))
    for (name, d), cell in zip(jobs, made, strict=True):
        rows = cell.result["rows"]
        kept = ("singular_values", "effective_rank", "stable_rank", "intruders", "relative_norm")
        found.spectra.setdefault(name, {})[d] = {r["name"]: {k: r[k] for k in kept} for r in rows}
        for metric in ("effective_rank", "stable_rank", "relative_norm"):
            values = [r[metric] for r in rows if r[metric] is not None]  # no relative norm where the base is zero
            if values:
                found.row("inspect", name, d, metric, statistics.mean(values))
        found.row("inspect", name, d, "intruders", sum(r["intruders"] for r in rows))
