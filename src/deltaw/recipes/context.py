"""What every cell of a run may use: the recipe, its sentences, the base model with the one head."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.demo import DOMAINS, Split, domain_split
from deltaw.errors import OptionError, unknown_name
from deltaw.models import Statistics, capture, find_sites, inventory, load_pretrained, load_tokenizer
from deltaw.recipes.cells import Job, fingerprint
from deltaw.recipes.schema import Recipe
from deltaw.train import TaskData, batches, classifier_inputs, evaluate, fit_probe, head_sites, save_model, tokenise

#: label names of the rated domains, in order
LABELS = ["negative", "positive"]


@dataclass
class Context:
    """One run's recipe and data, built alike in every process."""

    recipe: Recipe
    root: Path
    demo_data: str | None = None
    #: decompositions of the base's matrices, made once for all models that this process inspects
    base_spectra: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for domain in self.recipe.data.domains:
            if domain not in DOMAINS:
                raise unknown_name("domain in the recipe", domain, DOMAINS)
        if len(set(self.recipe.data.domains)) != len(self.recipe.data.domains):
            raise OptionError(f"the recipe's domains must differ, found {self.recipe.data.domains}")

    @property
    def domains(self) -> list[str]:
        return self.recipe.data.domains

    @property
    def base(self) -> Path:
        """Folder of the base with the head that all tasks start from."""
        return self.root / "base"

    @functools.cached_property
    def splits(self) -> dict[str, Split]:
        d = self.recipe.data
        return {
            name: domain_split(name, d.train, d.test, d.validation, seed=self.recipe.seed, demo_data=self.demo_data)
            for name in d.domains
        }

    def task(self, domain: str) -> TaskData:
        """The training task of a domain. Its validation sentences are kept for choices between merged models."""
        s = self.splits[domain]
        columns = {"text": "text", "label": "label"}
        return TaskData("classification", s.train, [], s.test, LABELS, columns, f"demo:{domain}")

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.recipe.model)

    def score(self, model: nn.Module, domain: str, part: str = "test") -> Any:
        """The model's evaluation on the test or validation sentences of a domain."""
        examples = getattr(self.splits[domain], part)
        return evaluate(model, self.tokenizer, examples, max_length=self.recipe.data.max_length)

    def correct(self, model: nn.Module) -> dict[str, list[int]]:
        """Per domain, 1 for every test sentence the model labels right."""
        return {d: list(self.score(model, d).correct) for d in self.domains}

    def batches(self, examples: list[dict[str, Any]], size: int = 64) -> list[Any]:
        """Padded batches of sentences without their labels."""
        rows = tokenise(
            [{"text": e["text"]} for e in examples], self.tokenizer, "classification", self.recipe.data.max_length
        )
        return [b for _, b in batches(rows, self.tokenizer, "classification", size)]

    def calibration(self, folder: Path, kinds: tuple[str, ...]) -> Statistics:
        """Moments of a model's activations on training sentences, equally many of each domain; kept for the last model."""
        if self._calibrated is None or self._calibrated[0] != (folder, kinds):
            assert self.recipe.compress is not None
            each = max(1, self.recipe.compress.calibration // len(self.domains))
            examples = [e for d in self.domains for e in self.splits[d].train[:each]]
            net = load_pretrained(folder, task="classification")
            self._calibrated = ((folder, kinds), capture(net, find_sites(net), self.batches(examples), kinds=kinds))
        return self._calibrated[1]

    _calibrated: tuple[tuple[Path, tuple[str, ...]], Statistics] | None = None

    def data_key(self, *parts: str) -> list[Any]:
        """The part of a cell's key that says which sentences it saw."""
        d = self.recipe.data
        return [d.train, d.validation, d.test, d.max_length, self.recipe.seed, *parts]

    @property
    def base_job(self) -> Job:
        """The job that makes `base`."""
        head = self.recipe.head
        seen = self.data_key(*self.domains) if head.init == "probe" else []
        return Job("base", fingerprint(self.recipe.model, self.recipe.pooling, head.model_dump(), seen), make_base)


def make_base(ctx: Context, folder: Path) -> dict[str, Any]:
    """The base model as a plain folder, its head random or fitted to all domains together."""
    recipe = ctx.recipe
    net: Any = load_pretrained(
        recipe.model,
        task="classification",
        seed=recipe.head.seed,
        pooling=recipe.pooling,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={n: i for i, n in enumerate(LABELS)},
    )
    if recipe.head.init == "probe":
        (head,) = [s for s in head_sites(inventory(net)) if s.role == "head"]
        classifier = net.get_submodule(head.module)
        examples = [e for d in ctx.domains for e in ctx.splits[d].train[: recipe.head.sentences]]
        seen = classifier_inputs(net, classifier, ctx.tokenizer, examples, max_length=recipe.data.max_length)
        labels = torch.tensor([e["label"] for e in examples])
        fitted = fit_probe(seen, labels, classes=len(LABELS), grid=(0.01, 0.1, 1.0), folds=3, seed=recipe.seed)
        with torch.no_grad():
            classifier.weight.copy_(fitted.weight)
            classifier.bias.copy_(fitted.bias)
    save_model(net, folder)
    ctx.tokenizer.save_pretrained(folder)
    return {"params": sum(p.numel() for p in net.parameters())}
