"""The four stages of the pipeline. Each turns finished cells into rows, and makes the cells that are missing."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from deltaw.models import load_pretrained
from deltaw.recipes.cells import Cell, fingerprint
from deltaw.recipes.context import Context
from deltaw.recipes.schema import AdaptPart, MergeMethodPart
from deltaw.train import TrainOptions, batches, fit_probe, load, mean_pooled_features, tokenise, train

PROBE = "linear-probe"


# -- adapt -----------------------------------------------------------------------------------------------------


def adapt_stage(ctx: Context) -> dict[str, dict[str, Cell]]:
    """Every adaptation of the recipe on every domain: {name: {domain: cell}}."""
    found: dict[str, dict[str, Cell]] = {}
    for part in ctx.recipe.adapt:
        found[part.name] = {d: _adapt_cell(ctx, part, d) for d in ctx.domains}
        results = {d: c.result for d, c in found[part.name].items()}
        ctx.accuracy_rows("adapt", part.name, {d: r["correct"] for d, r in results.items()})
        for d, r in results.items():
            ctx.row("adapt", part.name, d, "trainable_params", r["trainable_params"])
            ctx.row("adapt", part.name, d, "seconds", r["seconds"])
            if r.get("steps") is not None:
                ctx.row("adapt", part.name, d, "steps", r["steps"])
        ctx.row(
            "adapt",
            part.name,
            "mean",
            "trainable_params",
            statistics.mean(r["trainable_params"] for r in results.values()),
        )
        ctx.row("adapt", part.name, "mean", "seconds", statistics.mean(r["seconds"] for r in results.values()))
    return found


def _adapt_cell(ctx: Context, part: AdaptPart, domain: str) -> Cell:
    recipe = ctx.recipe

    def probe(folder: Path) -> dict[str, Any]:
        split, began = ctx.splits[domain], time.monotonic()
        net = load_pretrained(ctx.base.folder, task="base")
        length = recipe.data.max_length
        features = mean_pooled_features(net, ctx.tokenizer, split.train, max_length=length)
        fitted = fit_probe(features, torch.tensor([e["label"] for e in split.train]), seed=recipe.seed)
        seconds = time.monotonic() - began
        tested = mean_pooled_features(net, ctx.tokenizer, split.test, max_length=length)
        hits = fitted.logits(tested).argmax(-1) == torch.tensor([e["label"] for e in split.test])
        save_file({"weight": fitted.weight, "bias": fitted.bias}, str(folder / "probe.safetensors"))
        return {
            "correct": hits.int().tolist(),
            "trainable_params": fitted.trainable_params,
            "seconds": seconds,
            "strength": fitted.strength,
        }

    def adapted(folder: Path) -> dict[str, Any]:
        options = TrainOptions(
            epochs=part.epochs,
            batch_size=part.batch_size,
            lr=part.lr,
            max_length=recipe.data.max_length,
            seed=recipe.seed,
        )
        trained = train(
            ctx.base.folder,
            ctx.task(domain),
            method=part.method,
            optimizer=part.optimizer,
            parameters=part.parameters,
            targets=part.targets,
            method_options=part.options,
            optimizer_options=part.optimizer_options,
            options=options,
            out=folder / "model",
        )
        assert trained.evaluation is not None
        record = trained.record
        return {
            "correct": list(trained.evaluation.correct),
            "trainable_params": record["trainable_params"],
            "seconds": record["seconds"],
            "steps": record["steps"],
        }

    key = fingerprint(part.model_dump(), ctx.base.key, ctx.data_key(domain))
    return ctx.cells.make(f"adapt/{part.name}/{domain}", key, probe if part.method == PROBE else adapted)


# -- merge -----------------------------------------------------------------------------------------------------


def merge_stage(ctx: Context, adapted: dict[str, dict[str, Cell]]) -> tuple[dict[str, Cell], str]:
    """Merge the tuned models by every method; returns the cells and the method of lowest validation loss."""
    assert ctx.recipe.merge is not None
    tuned = adapted[ctx.recipe.merge.models]
    ctx.accuracy_rows("merge", "single-task", {d: c.result["correct"] for d, c in tuned.items()})
    if PROBE in adapted:
        ctx.accuracy_rows("merge", PROBE, {d: c.result["correct"] for d, c in adapted[PROBE].items()})
    cells = {}
    for part in ctx.recipe.merge.methods:
        cells[part.method] = cell = _merge_cell(ctx, part, tuned)
        ctx.accuracy_rows("merge", part.method, cell.result["correct"])
        ctx.row("merge", part.method, "all", "seconds", cell.seconds)
        ctx.row("merge", part.method, "all", "validation_loss", cell.result["validation_loss"])
        for option, value in cell.result["options"].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                ctx.row("merge", part.method, "all", option, value)
    return cells, min(cells, key=lambda m: cells[m].result["validation_loss"])


def _merge_cell(ctx: Context, part: MergeMethodPart, tuned: dict[str, Cell]) -> Cell:
    from deltaw.merge import merge

    models = [c.folder / "model" for c in tuned.values()]

    def work(folder: Path) -> dict[str, Any]:
        net = load_pretrained(ctx.base.folder, task="classification")
        tried: list[tuple[float, dict[str, Any]]] = []
        for options in _grid(part):
            net.load_state_dict(merge(ctx.base.folder, models, part.method, heads="average", **options))
            loss = (
                statistics.mean(ctx.score(net, d, "validation").loss for d in ctx.domains)
                if ctx.recipe.data.validation
                else 0.0
            )
            tried.append((loss, options))
        loss, options = min(tried, key=lambda t: t[0])
        merge(ctx.base.folder, models, part.method, folder / "model", heads="average", **options)
        net = load_pretrained(folder / "model", task="classification")
        correct = {d: list(ctx.score(net, d).correct) for d in ctx.domains}
        return {"correct": correct, "validation_loss": loss, "options": options, "tried": tried}

    key = fingerprint(part.model_dump(), [c.key for c in tuned.values()], ctx.base.key, ctx.data_key(*ctx.domains))
    return ctx.cells.make(f"merge/{part.method}", key, work)


def _grid(part: MergeMethodPart) -> list[dict[str, Any]]:
    """All combinations of the values to choose from, over the fixed options."""
    found = [dict(part.options)]
    for option, values in part.tune.items():
        found = [{**f, option: v} for f in found for v in values]
    return found


# -- compress --------------------------------------------------------------------------------------------------


def compress_stage(ctx: Context, merged: dict[str, Cell], best: str) -> None:
    """Compress the chosen merged model by every method at one budget, and measure size and latency."""
    part = ctx.recipe.compress
    assert part is not None
    source = merged[best if part.model == "best" else part.model]
    dense = _dense_cell(ctx, source)
    cells = {"dense": dense} | {m: _compress_cell(ctx, m, source) for m in part.methods}
    for method, cell in cells.items():
        r = cell.result
        ctx.accuracy_rows("compress", method, r["correct"])
        for metric in ("params", "linear_params", "size_bytes", "dense_size_bytes"):
            ctx.row("compress", method, "all", metric, r[metric])
        for size, latency in r["latency_ms"].items():
            ctx.row("compress", method, "all", "latency_ms", latency, batch=int(size))


def _compress_key(ctx: Context, source: Cell, *more: Any) -> str:
    assert ctx.recipe.compress is not None
    part = ctx.recipe.compress.model_dump(exclude={"methods", "model"})
    return fingerprint(part, source.key, ctx.data_key(*ctx.domains), *more)


def _dense_cell(ctx: Context, source: Cell) -> Cell:
    def work(folder: Path) -> dict[str, Any]:
        from deltaw.models import find_sites

        net = load_pretrained(source.folder / "model", task="classification")
        size = _folder_bytes(source.folder / "model")
        linear = sum(torch.Size(s.shape).numel() for s in find_sites(net, "all-linear"))
        return {
            "correct": source.result["correct"],
            "params": sum(p.numel() for p in net.parameters()),
            "linear_params": linear,
            "size_bytes": size,
            "dense_size_bytes": size,
            "latency_ms": _latency(ctx, net),
        }

    return ctx.cells.make("compress/dense", _compress_key(ctx, source, "dense"), work)


def _compress_cell(ctx: Context, method: str, source: Cell) -> Cell:
    from deltaw.compress import compress, save_compressed

    part = ctx.recipe.compress
    assert part is not None

    def work(folder: Path) -> dict[str, Any]:
        net = load_pretrained(source.folder / "model", task="classification")
        report = compress(net, method, part.ratio, calibration=_calibration(ctx), allocation=part.allocation)
        save_compressed(net, folder / "model", tokenizer=ctx.tokenizer)
        save_compressed(net, folder / "dense", dense=True, tokenizer=ctx.tokenizer)
        report.save_json(folder / "layers.json")
        net = load(folder / "model", task="classification")
        return {
            "correct": {d: list(ctx.score(net, d).correct) for d in ctx.domains},
            "params": sum(p.numel() for p in net.parameters()),
            "linear_params": report.params_after,
            "size_bytes": _folder_bytes(folder / "model"),
            "dense_size_bytes": _folder_bytes(folder / "dense"),
            "latency_ms": _latency(ctx, net),
        }

    return ctx.cells.make(f"compress/{method}", _compress_key(ctx, source, method), work)


def _calibration(ctx: Context) -> list[Any]:
    """Batches of training sentences, equally many of each domain, without labels."""
    assert ctx.recipe.compress is not None
    each = max(1, ctx.recipe.compress.calibration // len(ctx.domains))
    examples = [{"text": e["text"]} for d in ctx.domains for e in ctx.splits[d].train[:each]]
    rows = tokenise(examples, ctx.tokenizer, "classification", ctx.recipe.data.max_length)
    return [b for _, b in batches(rows, ctx.tokenizer, "classification")]


@torch.no_grad()
def _latency(ctx: Context, net: nn.Module) -> dict[str, float]:
    """Median milliseconds of one forward pass per batch size, on the first test sentences."""
    assert ctx.recipe.compress is not None
    net.eval()
    texts = [e for d in ctx.domains for e in ctx.splits[d].test]
    found = {}
    for size in ctx.recipe.compress.latency_batches:
        rows = tokenise(
            [{"text": e["text"]} for e in texts[:size]], ctx.tokenizer, "classification", ctx.recipe.data.max_length
        )
        ((_, batch),) = batches(rows, ctx.tokenizer, "classification", size)
        net(**batch)
        times = []
        for _ in range(ctx.recipe.compress.latency_repeats):
            began = time.perf_counter()
            net(**batch)
            times.append((time.perf_counter() - began) * 1000)
        found[str(size)] = statistics.median(times)
    return found


def _folder_bytes(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


# -- inspect ---------------------------------------------------------------------------------------------------


def inspect_stage(ctx: Context, adapted: dict[str, dict[str, Cell]]) -> None:
    """Spectra of ΔW, effective ranks and intruder dimensions of every adapted model against the base."""
    assert ctx.recipe.inspect is not None
    for name in ctx.recipe.inspect.models:
        for domain, cell in adapted[name].items():
            rows = _inspect_cell(ctx, name, domain, cell).result["rows"]
            ctx.spectra.setdefault(name, {})[domain] = {
                r["name"]: {
                    k: r[k] for k in ("singular_values", "effective_rank", "stable_rank", "intruders", "relative_norm")
                }
                for r in rows
            }
            for metric in ("effective_rank", "stable_rank", "relative_norm"):
                ctx.row("inspect", name, domain, metric, statistics.mean(r[metric] for r in rows))
            ctx.row("inspect", name, domain, "intruders", sum(r["intruders"] for r in rows))


def _inspect_cell(ctx: Context, name: str, domain: str, cell: Cell) -> Cell:
    from deltaw.adapters import fold
    from deltaw.inspect import inspect

    part = ctx.recipe.inspect
    assert part is not None

    def work(folder: Path) -> dict[str, Any]:
        tuned = load(cell.folder / "model", task="classification")
        found = inspect(
            load_pretrained(ctx.base.folder, task="classification"), fold(tuned), top_k=part.top_k, epsilon=part.epsilon
        )
        return found.as_dict()

    return ctx.cells.make(f"inspect/{name}/{domain}", fingerprint(part.model_dump(exclude={"models"}), cell.key), work)
