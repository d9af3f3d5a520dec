"""The streaming engine: reads the models tensor by tensor, applies a method, writes one model.

Memory holds `threads` tensors at a time, each with its base, what the method keeps and the result; of methods that work
entry by entry only the result and a small piece of the rest (pieces.py). Reads are memory-mapped. Worker threads read and
compute; results are consumed in name order, so the number of threads changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from deltaw import __version__, catalogue
from deltaw.errors import NonFiniteError, OptionError
from deltaw.memory import keep_freed_memory, return_freed_memory
from deltaw.merge.base import MergeMethod, TensorContext, normalized, weighted_sum
from deltaw.merge.output import Extras
from deltaw.merge.pieces import PIECE, ElementwiseMethod, Pieces
from deltaw.merge.plan import MergePlan, Row, Rules, plan_rows
from deltaw.merge.progress import Progress
from deltaw.merge.sources import Source, Tuned, all_finite, check_finite, load, open_source
from deltaw.merge.surgery import Operation, Surgery, check_rules
from deltaw.merge.workers import AHEAD, one_thread_each, ordered

R = TypeVar("R")
_METHOD_ACTIONS = ("merge", "matrix", "other")


@dataclass
class Job:
    """One merge, checked and planned."""

    base: Source | None
    models: list[Source]
    method: MergeMethod
    id: str
    options: dict[str, Any]
    weights: tuple[float, ...]
    rules: Rules
    rows: list[Row]
    device: torch.device | None
    threads: int
    operation: Operation | None = None  # of a method that changes the form of the model

    @classmethod
    def open(
        cls,
        base: Any,
        models: Any,
        method: str | MergeMethod,
        weights: Sequence[float] | None,
        rules: Rules,
        options: dict[str, Any],
        device: torch.device | str | None,
        threads: int,
    ) -> Job:
        """Resolve the method, open the sources, plan the rows; every check that needs no weights is made here."""
        rule, id, values = _resolve(method, options)
        if isinstance(models, (str, Path)) or not isinstance(models, (Sequence, Mapping)):
            raise OptionError(f"models is a {type(models).__name__}; expected a list of models")
        named = models.items() if isinstance(models, Mapping) else ((f"models[{i}]", m) for i, m in enumerate(models))
        origin = None if base is None else open_source(base, "base")
        tuned = [open_source(m, label, origin) for label, m in named]
        low, high = rule.models
        if not low <= len(tuned) <= high:
            wanted = f"{low}" if low == high else f"{low} or more" if high == float("inf") else f"{low} to {high:g}"
            raise OptionError(f"{id} takes {wanted} tuned models; {len(tuned)} were given")
        if base is None and rule.needs_base:
            raise OptionError(f"{id} works on differences to a base model; give the model that all were tuned from")
        place = torch.device(device) if device is not None else None
        if isinstance(rule, Surgery):
            assert origin is not None
            check_rules(id, rules, weights)
            plan = rule.operate(origin, tuned, rules.dtype, place)
            ones = (1.0,) * len(tuned)
            return cls(origin, tuned, rule, id, values, ones, rules, plan.rows, place, threads, plan)
        rows = plan_rows(origin, tuned, rule, rules)
        rule.check(rows, next((s.config for s in (origin, *tuned) if s is not None and s.config), None))
        return cls(origin, tuned, rule, id, values, _weights(weights, len(tuned)), rules, rows, place, threads)

    def plan(self, max_shard_bytes: float) -> MergePlan:
        """The plan with its estimates."""
        values = {"T": len(self.models), **self.options}
        card = getattr(self.method, "card", None)
        resident = card.evaluate("resident", **values) if card else len(self.models) + 2
        passes = card.evaluate("passes", **values) if card else 1
        # Beside what the rule holds, one result waits to be written. Averages and copies hold two more.
        held = {"merge": resident + 1, "matrix": resident + 1, "made": resident + 1, "tied": 0, "drop": 0}
        reading = max((m.overhead for m in self.models), default=0)

        def need(row: Row) -> int:
            if self._in_pieces(row) and not getattr(self.method, "prepares_whole", False):
                return row.output_bytes + int(resident + 2) * min(PIECE, row.numel) * row.compute.itemsize
            return (held.get(row.action, 3) + reading) * row.numel * row.compute.itemsize

        needs = sorted(map(need, self.rows), reverse=True)
        output = sum(r.output_bytes for r in self.rows)
        return MergePlan(
            self.id,
            self.options,
            self.base.label if self.base else None,
            [m.label for m in self.models],
            self.rows,
            int(sum(needs[: self.threads]) + min(max_shard_bytes, output) + min(AHEAD, output) * (self.threads > 1)),
            int(passes * sum(self._stored(r) for r in self.rows)),
        )

    def to_dict(self, bar: Progress) -> dict[str, Tensor]:
        """The merged state dict; tied names hold one tensor."""
        merged = dict(self.results(bar))
        merged.update({r.name: merged[r.same_as] for r in self.rows if r.action == "tied" and r.same_as in merged})
        order = (self.base or self.models[0]).shapes
        return {n: merged[n] for n in [*order, *(n for n in merged if n not in order)] if n in merged}

    def results(self, bar: Progress, skip: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """(name, merged tensor) in name order, but for the names in `skip`."""
        done = frozenset(skip)
        rows = [r for r in self.rows if r.action not in ("tied", "drop") and r.name not in done]
        shared = None
        if any(r.action in (*_METHOD_ACTIONS, "made") for r in rows):
            shared = self.prepare(bar)
        bar.begin(f"merging by {self.id}", len(rows))
        keep_freed_memory()
        made = ordered(self.threads, lambda r: self._merged(r, shared), rows, lambda r: r.output_bytes)
        with one_thread_each(self.method), made as results:
            for row, tensor in zip(rows, results, strict=True):
                yield row.name, tensor
                bar.advance(self._stored(row))
                if row.numel > 1 << 18 and not self._in_pieces(row):
                    return_freed_memory()

    def prepare(self, bar: Progress) -> Any:
        """What the method computes from the whole model before any tensor."""
        if self.operation is not None:
            return self.operation.prepare(bar)
        return self.method.prepare(lambda function: self._scan(function, bar))

    def resume_key(self, max_shard_bytes: float) -> dict[str, Any] | None:
        """Everything that decides the output, or None when an input lives in memory."""
        sources = [*self.models, *([self.base] if self.base else [])]
        prints = {s.label: s.fingerprint() for s in sources}
        beside = self.method.files
        if beside is None or any(p is None for p in prints.values()):
            return None
        beside = [*beside, *(self.operation.files if self.operation is not None else ())]
        rules = {k: str(v) for k, v in asdict(self.rules).items()}
        return {
            "deltaw": __version__,
            "method": self.id,
            "options": self.options,
            "weights": list(self.weights),
            "max_shard_bytes": max_shard_bytes,
            **rules,
            "base": self.base.label if self.base else None,
            "models": [m.label for m in self.models],
            "files": prints,
            "beside": [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in beside],
        }

    def extras(self, files: str) -> Extras | None:
        """The config, tokenizer and small files of the output."""
        if files == "none":
            return None
        if self.operation is not None:
            assert self.base is not None
            return self.operation.extras(Extras.of(self.base))
        return Extras.of(self._file_source(files))

    def _file_source(self, files: str) -> Source:
        first = self.models[0]
        if files == "first" or self.base is None:
            return first
        # A head that the base lacks needs a config that knows it.
        more = any(r.name not in self.base.shapes for r in self.rows if r.action not in ("drop", "tied"))
        return first if more and first.config is not None else self.base

    @property
    def untied(self) -> bool:
        """Whether the output stores a head that the base, by its config, ties to the embedding."""
        return any(s.aliases for s in (self.base, *self.models) if s is not None)

    def _scan(
        self, function: Callable[[Tensor | None, Sequence[Tensor], TensorContext], R], bar: Progress
    ) -> Iterator[R]:
        rows = [r for r in self.rows if r.action in _METHOD_ACTIONS]
        bar.begin(f"surveying for {self.id}", len(rows))
        with ordered(self.threads, lambda row: function(*self._inputs(row, None)), rows) as results:
            for row, result in zip(rows, results, strict=True):
                yield result
                bar.advance(self._stored(row))
                if row.numel > 1 << 18:
                    return_freed_memory()

    def _inputs(self, row: Row, shared: Any) -> tuple[Tensor | None, Tuned, TensorContext]:
        """What a rule takes: the base's tensor (None when unused), the tuned ones, the context."""
        models = [self.models[t] for t in row.models]
        origin = self._origin(row)
        base = None if origin is None else load(origin, row.name, row.compute, self.device)
        device = base.device if base is not None else self.device or models[0].device(row.name)
        return base, Tuned(models, row.name, row.compute, device), self._context(row, shared)

    def _origin(self, row: Row) -> Source | None:
        """The base, where the rule of this row works on differences to it."""
        return self.base if self.method.needs_base and row.action in _METHOD_ACTIONS else None

    def _context(self, row: Row, shared: Any) -> TensorContext:
        epsilon = max(torch.finfo(self.models[t].precision(row.name)).eps for t in row.models)
        weights = tuple(self.weights[t] for t in row.models)
        return TensorContext(row.name, row.site, row.action == "matrix", weights, shared, epsilon)

    def _in_pieces(self, row: Row) -> bool:
        """Whether this row is merged piece by piece: the rule allows it, and every part can be read alone."""
        read = [self.models[t] for t in row.models]
        if row.action != "merge" or not isinstance(self.method, ElementwiseMethod) or not self.method.in_pieces:
            return False
        return row.numel > 0 and all(s.stored for s in (self.base, *read) if s is not None)

    def _merged_in_pieces(self, row: Row, shared: Any) -> Tensor:
        method = self.method
        assert isinstance(method, ElementwiseMethod)
        models, origin = [self.models[t] for t in row.models], self._origin(row)
        base = None if origin is None else origin.read(row.name)
        tuned = [m.read(row.name) for m in models]
        device = self.device or (tuned[0] if base is None else base).device

        def check(model: int | None, x: Tensor) -> None:
            source = origin if model is None else models[model]
            assert source is not None
            check_finite(source, row.name, x)

        ctx = self._context(row, shared)
        shows = method.shows_nonfinite(ctx)
        by_output = row.site.kind == "conv"
        pieces = Pieces(base, tuned, row.compute, device, by_output=by_output, check=None if shows else check)
        ctx = replace(ctx, local=method.measure(pieces, ctx))
        result = torch.empty(row.shape, dtype=row.dtype, device=device)
        for target, (part, others) in zip(pieces.cut(result), pieces, strict=True):
            merged = method.piece(part, others, ctx)
            if not all_finite(target.copy_(merged), row.compute):
                for model, x in enumerate(others) if shows else ():
                    check(model, x)
                if shows and part is not None:
                    check(None, part)
                self._refuse(row, merged)
        return result

    def _merged(self, row: Row, shared: Any) -> Tensor:
        """One output tensor, in the output dtype."""
        if row.action in ("base", "first"):
            return self._copied(row)
        if self._in_pieces(row):
            return self._merged_in_pieces(row, shared)
        if row.action == "made":
            assert self.operation is not None
            merged = self.operation.make(row)
        else:
            base, tuned, ctx = self._inputs(row, shared)
            average = row.action == "average"
            merged = weighted_sum(tuned, normalized(ctx.weights)) if average else self.method.tensor(base, tuned, ctx)
        result = merged.to(row.dtype)
        if not all_finite(result, row.compute):
            self._refuse(row, merged)
        return result

    def _refuse(self, row: Row, merged: Tensor) -> NoReturn:
        """Raise NonFiniteError for a result that is not finite in the output dtype."""
        raise NonFiniteError(
            f"{self.id} makes NaN or infinity of tensor {row.name!r}: its largest magnitude is "
            f"{float(merged.abs().max()):g}, and {row.dtype} holds up to {torch.finfo(row.dtype).max:g}; "
            "give a wider `dtype` or a smaller scale"
        )

    def _copied(self, row: Row) -> Tensor:
        source = self.models[row.models[0]] if row.action == "first" else self.base
        assert source is not None
        tensor = source.read(row.name)
        if tensor.is_floating_point():
            tensor = load(source, row.name, tensor.dtype, None)
        return tensor.to(row.dtype, copy=True)

    def _stored(self, row: Row) -> int:
        """Bytes that one pass over the inputs of a row reads."""
        if row.action == "made":
            return row.output_bytes
        read = [self.models[t] for t in row.models]
        if self.base is not None and row.name in self.base.shapes and (row.action == "base" or self.method.needs_base):
            read.append(self.base)
        return sum(row.numel * s.dtypes[row.name].itemsize for s in read)


def _resolve(method: str | MergeMethod, options: Mapping[str, Any]) -> tuple[MergeMethod, str, dict[str, Any]]:
    """The method object, its id, and all its options with their values."""
    if isinstance(method, MergeMethod):
        if options:
            raise OptionError(f"options {sorted(options)} given beside a ready {type(method).__name__}")
        card = getattr(method, "card", None)
        return method, card.id if card else type(method).__name__, dict(method.recorded)
    card = catalogue.get(method, family="merge")
    catalogue.check_options(card, options)
    values = {**card.options, **options}
    return card.target(**options), card.id, {name: _recorded(value) for name, value in values.items()}


def _recorded(value: Any) -> Any:
    """An option as the plan and the model card show it: plain data as it is, statistics by file or as "in memory"."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_recorded(v) for v in value]
    if isinstance(value, Mapping) and all(isinstance(k, str) and not isinstance(v, Tensor) for k, v in value.items()):
        return {k: _recorded(v) for k, v in value.items()}
    return "in memory"


def _weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise OptionError(f"{len(weights)} weights for {count} models; give one for each, in their order")
    values = tuple(float(w) for w in weights)
    if not all(math.isfinite(w) for w in values):
        raise OptionError(f"weights {list(values)}: expected finite numbers")
    return values
