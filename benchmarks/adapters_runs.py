"""One training of a structure on the demo's sentences: for `adapters_quality.py` and `adapters_export.py`.

The model, head and sentences are those of the demo: all-MiniLM-L6-v2 with a classifier on the mean over tokens, its head
fitted to a few sentences of the domains.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from orthogonalize import RESULTS
from torch import nn

import deltaw
from deltaw import adapters, catalogue
from deltaw.errors import NonFiniteError
from deltaw.models import Site, capture, capture_gradients, find_sites, inventory, load_pretrained
from deltaw.recipes import load_recipe
from deltaw.recipes.context import Context, make_base
from deltaw.recipes.schema import Recipe
from deltaw.train import Evaluation, batches, collator, evaluate, head_sites, prepare, tokenise

FULL = "full"


@dataclass(frozen=True)
class Settings:
    """Data, schedule and budget, the same for every run."""

    domains: tuple[str, ...] = ("tweets", "nyt")
    train: int = 1000
    validation: int = 200
    test: int = 600
    max_length: int = 64
    epochs: float = 1.0
    batch: int = 16
    warmup: float = 0.1
    clip: float = 1.0
    head_sentences: int = 200
    #: trained numbers of the structures, the head's left out: LoRA of rank 8 on the 36 matrices
    budget: int = 331_776
    #: training sentences for statistics of activations and of the mean gradient, and for the Fisher diagonal, which
    #: takes them one by one
    sentences: int = 128
    fisher_sentences: int = 64
    rates: int = 3
    seeds: int = 3


@dataclass(frozen=True)
class Size:
    """How a method's trained numbers are set where the rank alone does not, and why so."""

    why: str
    option: str | None = "rank"
    values: Iterable[int] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


#: methods whose size is not a rank from 1 to min(m, n) with all else at its default
SIZES = {
    "clover": Size("one matrix of the head's size for each head, on keys and values alone", None),
    "fourierft": Size("its size is the number of frequencies", "frequencies", range(16, 20_001, 16)),
    "intrinsic": Size(
        "one short vector for the whole model is its point; sparse, as Fastfood takes longer than the model itself",
        None,
        options={"size": 2000, "projection": "sparse"},
    ),
    "lora2": Size("the outer product holds nearly all numbers", "outer", range(4, 65)),
    "oft": Size("blocks must divide 384 and 1536", "block_size", (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)),
    "qgoft": Size("four numbers for each rotation of a fixed tree: no size to choose", None),
    "randlora": Size("bases of rank 16 are the nearest power of two", "rank", (8, 16, 32, 64)),
    "sara": Size("as many of the smallest entries of each matrix", "count", range(64, 20_001, 64)),
    "svft": Size("full rank; the width of the band is the size", "bands", range(65), {"pattern": "banded"}),
}
#: whose sentences a method's statistics come from, where these are not the task's own
OTHERS = {"osrm": "the inputs of the other domain: it starts where those are weak"}
#: methods whose steps throw the moments away
PLAIN_GRADIENT = tuple(card.id for card in catalogue.cards("adapters") if card.target.optimizer == "sgd")


def method_ids() -> list[str]:
    """All structures that have a ΔW."""
    return [card.id for card in catalogue.cards("adapters") if card.target.form != "function"]


def trained_numbers(id: str, options: Mapping[str, Any], shapes: Sequence[tuple[int, int]]) -> int:
    """By the card's formula, over matrices of these shapes [m, n]."""
    card = catalogue.get(id, "adapters")
    values = {**card.options, **options}
    each = {shape: card.evaluate("trainable", **{**values, "m": shape[0], "n": shape[1]}) for shape in set(shapes)}
    return sum(count * round(each[shape]) for shape, count in Counter(shapes).items())


def sized(id: str, budget: int, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The options that bring a method's trained numbers nearest to the budget; of equal ones the larger."""
    size = SIZES.get(id, Size("rank"))
    if size.option is None or size.option not in catalogue.get(id, "adapters").options:
        return dict(size.options)
    values = list(size.values) or list(range(1, min(min(s) for s in shapes) + 1))
    found = {v: trained_numbers(id, {**size.options, size.option: v}, shapes) for v in values}
    best = min(values, key=lambda v: (abs(found[v] - budget), -v))
    return {**size.options, size.option: best}


def recipe_of(settings: Settings) -> Recipe:
    """The demo's recipe with these counts: it makes the sentences, the base and its head."""
    recipe = load_recipe("sentiment")
    data: dict[str, Any] = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    data |= {"domains": list(settings.domains), "max_length": settings.max_length}
    changes: dict[str, Any] = {"data": recipe.data.model_copy(update=data), "merge": None, "compress": None}
    changes |= {"head": recipe.head.model_copy(update={"sentences": settings.head_sentences}), "inspect": None}
    return recipe.model_copy(update=changes)


@lru_cache(maxsize=1)
def context(folder: Path, settings: Settings) -> Context:
    return Context(recipe_of(settings), folder)


def open_context(folder: Path, settings: Settings) -> Context:
    """The context, whose base is made if it is not there."""
    ctx = context(folder, settings)
    if not ctx.base.exists():
        make_base(ctx, ctx.base)
    return ctx


def base_model(ctx: Context) -> Any:
    return load_pretrained(ctx.base, task="classification")


def training_batches(ctx: Context, domain: str, count: int, size: int) -> list[Any]:
    """The first training sentences of a domain with their labels, padded."""
    examples = ctx.splits[domain].train[:count]
    rows = tokenise(examples, ctx.tokenizer, "classification", ctx.recipe.data.max_length)
    return [batch for _, batch in batches(rows, ctx.tokenizer, "classification", size)]


@lru_cache(maxsize=6)
def collect(folder: Path, settings: Settings, domain: str, kind: str) -> tuple[Any, float]:
    """Statistics of one kind from the training sentences, and the CPU seconds that they took."""
    ctx, start = context(folder, settings), time.process_time()
    net = base_model(ctx)
    sites = sites_of(net)
    found: Any
    if kind == "weight_fisher":
        found = capture_gradients(net, sites, training_batches(ctx, domain, settings.fisher_sentences, 8), (kind,))
    elif kind.startswith("weight_"):
        parts = training_batches(ctx, domain, settings.sentences, settings.batch)
        found = capture_gradients(net, sites, parts, (kind,), per="batch")
    else:
        found = capture(net, sites, training_batches(ctx, domain, settings.sentences, 32), (kind,))
    return found, time.process_time() - start


def sites_of(net: Any) -> list[Site]:
    """The matrices that structures are put on: all linear ones but the head."""
    return find_sites(net, "all-linear", exclude=[s.module for s in head_sites(inventory(net))])


def matrix_shapes(ctx: Context) -> list[tuple[int, int]]:
    """[m, n] of those matrices of the base."""
    return [site.matrix_shape for site in sites_of(base_model(ctx))]


@cache
def best_rates() -> dict[str, dict[str, float]]:
    """{method: {domain: rate}} by the record of adapters_quality.py."""
    record = json.loads((RESULTS / "adapters_quality.json").read_text(encoding="utf-8"))
    return {row["method"]: row["rates"] for row in record["summary"]}


def score(net: Any, ctx: Context, settings: Settings, domain: str) -> Evaluation:
    """On the test sentences of a domain."""
    return evaluate(net.eval(), ctx.tokenizer, ctx.splits[domain].test, max_length=settings.max_length)


@torch.no_grad()
def with_head(net: Any, trained: Any) -> Any:
    """`net` with the head of `trained`, which no LoRA carries."""
    values = dict(trained.named_parameters())
    for site in head_sites(inventory(net)):
        net.get_parameter(site.name).copy_(values[site.name])
    return net


def prepared(
    id: str, options: Mapping[str, Any], ctx: Context, settings: Settings, domain: str, seed: int
) -> tuple[Any, float]:
    """The base with the structure on it, and the CPU seconds that its statistics took when they were collected before.

    They count for every run that uses them, though a process collects them once.
    """
    net = base_model(ctx)
    options, stats, before = dict(options), [], 0.0
    if id != FULL:
        (other,) = [d for d in settings.domains if d != domain]
        for kind in sorted(catalogue.get(id, "adapters").target.needs):
            start = time.process_time()
            values, seconds = collect(ctx.root, settings, other if id in OTHERS else domain, kind)
            before += seconds - (time.process_time() - start)
            stats.append(values)
        options["stats"] = stats
    prepare(net, id, parameters="matrices", seed=seed, **options)
    return net, before


def steps(id: str, net: Any, ctx: Context, settings: Settings, domain: str, lr: float, seed: int) -> None:
    """Train in batches of like length in random order: warm-up, then linear to zero; with the structures' own penalties."""
    tokenizer = ctx.tokenizer
    rows = tokenise(ctx.splits[domain].train, tokenizer, "classification", settings.max_length)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer: Any
    if id in PLAIN_GRADIENT:
        optimizer = torch.optim.SGD(trained, lr=lr)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rates of structures may be far from those of whole weights
            optimizer = deltaw.optimizer(net, "adamw", lr=lr)
    build = collator(tokenizer, "classification")
    plan: list[list[int]] = []
    for _ in range(math.ceil(settings.epochs)):
        for part in torch.randperm(len(rows), generator=generator).split(20 * settings.batch):
            plan += grouped(part.tolist(), rows, settings.batch, generator)
    plan = plan[: math.ceil(settings.epochs * len(rows) / settings.batch)]
    passes = [*(s.halfway for s in adapters.steppers(net, optimizer, steps=len(plan), seed=seed) if s.passes == 2)]
    passes.append(optimizer.step)
    warm = math.ceil(settings.warmup * len(plan))
    rates = [group["lr"] for group in optimizer.param_groups]
    net.train()
    for number, chunk in enumerate(plan):
        batch = build([rows[i] for i in chunk])
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min((number + 1) / warm, (len(plan) - number) / max(len(plan) - warm, 1))
        for after in passes:
            optimizer.zero_grad()
            loss = net(**batch).loss + adapters.penalty(net)
            if not loss.isfinite():
                raise NonFiniteError(f"the loss is {loss.item()}")
            loss.backward()
            nn.utils.clip_grad_norm_(trained, settings.clip)
            after()
    net.eval()


def grouped(order: list[int], rows: Sequence[dict[str, Any]], size: int, generator: torch.Generator) -> list[list[int]]:
    """Batches of rows of like length, in random order."""
    order = sorted(order, key=lambda i: len(rows[i]["input_ids"]))
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    return [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
