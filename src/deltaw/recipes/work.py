"""What the cells of each stage do: functions of the context and an empty folder, run in this process or another."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from deltaw import catalogue
from deltaw.models import load_pretrained
from deltaw.recipes.context import Context
from deltaw.recipes.schema import AdaptPart, MergeMethodPart
from deltaw.train import TrainOptions, fit_probe, load, mean_pooled_features, train


def probe(ctx: Context, folder: Path, domain: str) -> dict[str, Any]:
    """The linear probe on the frozen base."""
    split, began = ctx.splits[domain], time.monotonic()
    net = load_pretrained(ctx.base, task="base")
    length = ctx.recipe.data.max_length
    features = mean_pooled_features(net, ctx.tokenizer, split.train, max_length=length)
    fitted = fit_probe(features, torch.tensor([e["label"] for e in split.train]), seed=ctx.recipe.seed)
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


def adapt(ctx: Context, folder: Path, part: AdaptPart, domain: str) -> dict[str, Any]:
    """One adaptation of the base to one domain."""
    trained = train(
        ctx.base,
        ctx.task(domain),
        method=part.method,
        optimizer=part.optimizer,
        parameters=part.parameters,
        targets=part.targets,
        method_options=part.options,
        optimizer_options=part.optimizer_options,
        options=TrainOptions(
            epochs=part.epochs,
            batch_size=part.batch_size,
            lr=part.lr,
            max_length=ctx.recipe.data.max_length,
            seed=ctx.recipe.seed,
        ),
        out=folder / "model",
    )
    assert trained.evaluation is not None
    kept = {k: trained.record[k] for k in ("trainable_params", "seconds", "steps")}
    return {"correct": list(trained.evaluation.correct), **kept}


def merge(ctx: Context, folder: Path, part: MergeMethodPart, models: list[Path]) -> dict[str, Any]:
    """The merged model with the options of lowest validation loss."""
    from deltaw.merge import merge as merge_models

    tried: list[tuple[float, dict[str, Any]]] = []
    for i, options in enumerate(option_grid(part)):
        merge_models(ctx.base, models, part.method, folder / f"try-{i}", heads="average", **options)
        net = load_pretrained(folder / f"try-{i}", task="classification")
        losses = [ctx.score(net, d, "validation").loss for d in ctx.domains] if ctx.recipe.data.validation else [0.0]
        tried.append((statistics.mean(losses), options))
    best = min(range(len(tried)), key=lambda i: tried[i][0])
    (folder / f"try-{best}").rename(folder / "model")
    for left in folder.glob("try-*"):
        shutil.rmtree(left)
    net = load_pretrained(folder / "model", task="classification")
    loss, options = tried[best]
    return {"correct": ctx.correct(net), "validation_loss": loss, "options": options, "tried": tried}


def option_grid(part: MergeMethodPart) -> list[dict[str, Any]]:
    """All combinations of the values to choose from, over the fixed options."""
    found = [dict(part.options)]
    for option, values in part.tune.items():
        found = [{**f, option: v} for f in found for v in values]
    return found


def compress(ctx: Context, folder: Path, method: str, source: Path) -> dict[str, Any]:
    """The merged model with its linear layers compressed, as two factors each and multiplied out."""
    from deltaw.compress import compress as compress_model
    from deltaw.compress import save_compressed

    part = ctx.recipe.compress
    assert part is not None
    needs = {k for m in part.methods for k in catalogue.get(m, "compress").target.needs}
    # One calibration serves all methods, and lets each report its output error.
    stats = ctx.calibration(source, tuple(sorted({"input_cov", "input_mean", *needs})))
    net = load_pretrained(source, task="classification")
    report = compress_model(net, method, part.ratio, calibration=stats, allocation=part.allocation)
    save_compressed(net, folder / "model", tokenizer=ctx.tokenizer)
    save_compressed(net, folder / "dense", dense=True, tokenizer=ctx.tokenizer)
    report.save_json(folder / "layers.json")
    net = load(folder / "model", task="classification")
    return {
        "correct": ctx.correct(net),
        "params": sum(p.numel() for p in net.parameters()),
        "linear_params": report.params_after,
        "linear_params_before": report.params_before,
        "size_bytes": weight_bytes(folder / "model"),
        "dense_size_bytes": weight_bytes(folder / "dense"),
    }


@torch.no_grad()
def latency(ctx: Context, folder: Path, models: dict[str, Path]) -> dict[str, Any]:
    """Median milliseconds of a forward pass per model and batch size, the models in turn so that drift hits all alike."""
    part = ctx.recipe.compress
    assert part is not None
    nets: dict[str, nn.Module] = {m: load(f, task="classification") for m, f in models.items()}
    texts = [e for d in ctx.domains for e in ctx.splits[d].test]
    found: dict[str, dict[str, float]] = {m: {} for m in nets}
    for size in part.latency_batches:
        (batch,) = ctx.batches(texts[:size], size)
        times: dict[str, list[float]] = {m: [] for m in nets}
        for repeat in range(part.latency_repeats + 1):
            for m, net in nets.items():
                began = time.perf_counter()
                net(**batch)
                if repeat:  # the first pass warms up
                    times[m].append((time.perf_counter() - began) * 1000)
        for m in nets:
            found[m][str(size)] = statistics.median(times[m])
    return {"latency_ms": found}


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a folder."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def inspect(ctx: Context, folder: Path, model: Path) -> dict[str, Any]:
    """What one adapted model changed in the base."""
    from deltaw.adapters import fold
    from deltaw.inspect import inspect as inspect_model

    part = ctx.recipe.inspect
    assert part is not None
    found = inspect_model(
        load_pretrained(ctx.base, task="classification"),
        fold(load(model, task="classification")),
        top_k=part.top_k,
        epsilon=part.epsilon,
        cache=ctx.base_spectra,
    )
    return found.as_dict()
