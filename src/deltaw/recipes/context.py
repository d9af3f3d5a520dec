"""What every stage of a run shares: the recipe, its data, the base model with the one head, and the results so far."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.demo import DOMAINS, Split, domain_split
from deltaw.errors import OptionError, unknown_name
from deltaw.models import inventory, load_pretrained, load_tokenizer
from deltaw.recipes.cells import Cell, Cells, fingerprint
from deltaw.recipes.schema import Recipe
from deltaw.train import TaskData, classifier_inputs, evaluate, fit_probe, head_sites, save_model

#: label names of the rated domains, in order
LABELS = ["negative", "positive"]


@dataclass
class Context:
    """One run. Rows, predictions and spectra collect in the order of the stages."""

    recipe: Recipe
    cells: Cells
    demo_data: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    predictions: dict[str, list[int]] = field(default_factory=dict)
    spectra: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    #: decompositions of the base's matrices, made once for all models that are inspected
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
        return TaskData(
            "classification", s.train, [], s.test, LABELS, {"text": "text", "label": "label"}, f"demo:{domain}"
        )

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.recipe.model)

    @functools.cached_property
    def base(self) -> Cell:
        """The base with the head that all tasks start from, as a plain model folder."""

        def work(folder: Path) -> dict[str, Any]:
            net = load_pretrained(
                self.recipe.model,
                task="classification",
                seed=self.recipe.head.seed,
                pooling=self.recipe.pooling,
                num_labels=len(LABELS),
                id2label=dict(enumerate(LABELS)),
                label2id={n: i for i, n in enumerate(LABELS)},
            )
            if self.recipe.head.init == "probe":
                self._fit_head(net)
            save_model(net, folder)
            self.tokenizer.save_pretrained(folder)
            return {"params": sum(p.numel() for p in net.parameters())}

        head = self.recipe.head
        seen = self.data_key(*self.domains) if head.init == "probe" else []
        return self.cells.make(
            "base", fingerprint(self.recipe.model, self.recipe.pooling, head.model_dump(), seen), work
        )

    def _fit_head(self, net: nn.Module) -> None:
        """Set the classifier to the logistic regression over all domains together."""
        (head,) = [s for s in head_sites(inventory(net)) if s.role == "head"]
        classifier = net.get_submodule(head.module)
        examples = [e for d in self.domains for e in self.splits[d].train[: self.recipe.head.sentences]]
        seen = classifier_inputs(net, classifier, self.tokenizer, examples, max_length=self.recipe.data.max_length)
        labels = torch.tensor([e["label"] for e in examples])
        fitted = fit_probe(seen, labels, classes=len(LABELS), grid=(0.01, 0.1, 1.0), folds=3, seed=self.recipe.seed)
        with torch.no_grad():
            classifier.weight.copy_(fitted.weight)
            classifier.bias.copy_(fitted.bias)

    def data_key(self, *parts: str) -> list[Any]:
        """The part of a cell's key that says which sentences it saw."""
        d = self.recipe.data
        return [d.train, d.validation, d.test, d.max_length, self.recipe.seed, *parts]

    def row(self, stage: str, method: str, domain: str, metric: str, value: float, **more: Any) -> None:
        """Add one result row."""
        self.rows.append(
            {
                "stage": stage,
                "method": method,
                "domain": domain,
                "metric": metric,
                "value": value,
                "seed": self.recipe.seed,
                **more,
            }
        )

    def score(self, model: nn.Module, domain: str, part: str = "test") -> Any:
        """The model's evaluation on the test or validation sentences of a domain."""
        return evaluate(
            model, self.tokenizer, getattr(self.splits[domain], part), max_length=self.recipe.data.max_length
        )

    def accuracy_rows(self, stage: str, method: str, correct: dict[str, list[int]]) -> None:
        """Rows of accuracy per domain and their mean, and the predictions behind them."""
        shares = []
        for domain, hits in correct.items():
            shares.append(sum(hits) / len(hits))
            self.row(stage, method, domain, "accuracy", shares[-1], n=len(hits))
            self.predictions[f"{stage}/{method}/{domain}"] = hits
        self.row(stage, method, "mean", "accuracy", sum(shares) / len(shares), n=sum(len(h) for h in correct.values()))
