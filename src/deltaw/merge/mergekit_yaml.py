"""mergekit's YAML: its configuration read as the arguments of `merge`.

What is read: `merge_method`, `base_model`, `models` (or one slice over whole models), `parameters` (of a model, of the
slice and global), `dtype`, `out_dtype`, and a tokenizer from the base. A parameter is a number; a list, interpolated over
the depth of the layers; or a list of `{filter, value}`, of which the first whose filter is part of the tensor's name
holds. The nearest place wins: model, slice, global. Every other key is refused by its path, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import CheckpointError, OptionError, unknown_name
from deltaw.merge.base import Scan, TensorContext
from deltaw.merge.dare import Dare
from deltaw.merge.linear import Linear
from deltaw.merge.mergekit_file import LAYER, Parameters, entries_of, layer_depths, load, only
from deltaw.merge.model_stock import ModelStock
from deltaw.merge.pieces import ElementwiseMethod, Pieces
from deltaw.merge.slerp import Slerp
from deltaw.merge.sources import Source, open_source
from deltaw.merge.task_arithmetic import TaskArithmetic
from deltaw.merge.ties import Ties
from deltaw.models import floating_dtype, read_json

_TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
        "tokenizer", "chat_template")  # fmt: skip


class _TiesByModel(Ties):
    """TIES as mergekit has it: thresholds and sign ties for each tensor, a density for each model."""

    def __init__(self, density: Sequence[float], scale: float, combine: str):
        super().__init__(min(density), scale, trim="tensor", combine=combine, zero_sign="positive")
        self._each = list(density)

    def densities(self, count: int) -> list[float]:
        return self._each


@dataclass(frozen=True)
class _Kind:
    """How one of mergekit's methods is made: its parameters with their defaults, and the rule for their values."""

    card: type[ElementwiseMethod]
    build: Callable[[dict[str, Any], list[dict[str, Any]]], ElementwiseMethod]
    whole: Mapping[str, Any] = field(default_factory=dict)  # of the tensor; ... means required
    each: Mapping[str, Any] = field(default_factory=dict)  # of each model
    needs_base: bool = True
    count: tuple[int, float] = (1, float("inf"))  # models beside the base


def _ties(whole: dict[str, Any], each: list[dict[str, Any]]) -> ElementwiseMethod:
    return _TiesByModel([e["density"] for e in each], whole["lambda"], "mean" if whole["normalize"] else "sum")


def _dare(consensus: str, whole: dict[str, Any], each: list[dict[str, Any]]) -> ElementwiseMethod:
    return Dare(
        [e["density"] for e in each],
        whole["lambda"],
        "norm" if whole["rescale"] else "none",
        consensus,
        _divides(whole, each) if consensus == "none" else whole["normalize"],
        drop_heads=True,
    )


def _divides(whole: dict[str, Any], each: list[dict[str, Any]]) -> bool:
    """mergekit divides by the sum of the weights unless it is 0."""
    return whole["normalize"] and abs(sum(e["weight"] for e in each)) >= 1e-8


_SPARSE = {"weight": ..., "density": 1.0}
_KINDS = {
    "linear": _Kind(
        Linear, lambda whole, each: Linear(whole["normalize"]), {"normalize": True}, {"weight": ...}, needs_base=False
    ),
    "task_arithmetic": _Kind(
        TaskArithmetic,
        lambda whole, each: TaskArithmetic(whole["lambda"], _divides(whole, each)),
        {"normalize": False, "lambda": 1.0, "int8_mask": False},
        {"weight": ...},
    ),
    "ties": _Kind(Ties, _ties, {"normalize": True, "lambda": 1.0, "int8_mask": False}, _SPARSE),
    "dare_linear": _Kind(
        Dare,
        partial(_dare, "none"),
        {"normalize": False, "rescale": True, "lambda": 1.0, "int8_mask": False},
        _SPARSE,
    ),
    "dare_ties": _Kind(
        Dare, partial(_dare, "sum"), {"normalize": False, "rescale": True, "lambda": 1.0, "int8_mask": False}, _SPARSE
    ),
    "slerp": _Kind(Slerp, lambda whole, each: Slerp(whole["t"]), {"t": ...}, count=(1, 1)),
    "model_stock": _Kind(
        ModelStock,
        lambda whole, each: ModelStock(whole["filter_wise"], clamp=False),
        {"filter_wise": False},
        count=(2, float("inf")),
    ),
}


def read_mergekit(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A mergekit configuration (a YAML file or its content) as arguments of `merge` and `plan`.

    Methods: linear, task_arithmetic, ties, dare_linear, dare_ties, slerp and model_stock. A model is a path, or
    `path+adapter` for a model with an adapter folder on it, which is read matrix by matrix. The path of an adapter alone is
    one on `base_model`. Paths are relative to the working directory, else to the file's folder. A layer's depth is its number over the highest of its stack; tensors
    outside of layers have depth 0, as in mergekit.

    Different from mergekit: sums are taken in float32 whatever `dtype` says, which (with `out_dtype` before it) is the
    dtype of the result; ties keeps all entries equal to the last kept, of which bfloat16 models have many, where mergekit takes
    any of them; DARE's masks are drawn from a seed for each tensor; ties divides by the sum of |weights| where
    a weight is negative; vocabularies must be equal.

    Raises:
        OptionError: a key or value that is not supported, named by its path.
        UnknownNameError: no such method.
        CheckpointError: unreadable files, or tokenizers that differ where the base's is asked for.

    Examples:
        >>> from deltaw.merge import merge
        >>> from deltaw.models import CheckpointWriter
        >>> for name, value in (("a", 1.0), ("b", 3.0)):
        ...     with CheckpointWriter(name) as writer:
        ...         writer.write("layer.weight", torch.full((4, 3), value))
        >>> models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", "b")]
        >>> config = {"merge_method": "linear", "models": models, "dtype": "float32"}
        >>> merge(**read_mergekit(config))["layer.weight"][0]
        tensor([2., 2., 2.])
    """
    path = None if isinstance(config, Mapping) else Path(config).expanduser()
    content = load(path) if path is not None else config
    assert isinstance(content, Mapping)
    only(content, "", _TOP)
    kind = _kind(content)
    entries, slice_base, layered = entries_of(content)
    base_name = slice_base or content.get("base_model")
    if base_name is None and kind.needs_base:
        raise OptionError(f"base_model: {content['merge_method']} needs one; give the model that all were tuned from")
    for key in ("dtype", "out_dtype"):
        _dtype(content.get(key), key)
    opened: dict[str, Source] = {}
    open_one = partial(_open, folder=path.parent if path is not None else Path(), opened=opened)
    base = None if base_name is None else open_one(base_name, "base_model")
    given = [open_one(e.model, f"{e.where}.model", base=base) for e in entries]
    for entry, source in zip(entries, given, strict=True):
        if entry.where in layered:
            _whole_models(layered[entry.where], entry.where, source)
    _tokenizer(content, base_name, base, given)
    if kind.needs_base:  # the base among the models is not one of them
        entries = [e for e in entries if e.model != base_name]
    low, high = kind.count
    if not low <= len(entries) <= high:
        wanted = f"{low}" if low == high else f"{low} or more"
        raise OptionError(
            f"models: {content['merge_method']} takes {wanted}"
            + (" beside base_model" if kind.needs_base else "")
            + f"; {len(entries)} were given"
        )
    models = [opened[e.model] for e in entries]
    whole_slice = content["slices"][0] if content.get("slices") else {}
    reader = Parameters(
        kind.whole,
        kind.each,
        entries,
        [
            ("slices[0].parameters", whole_slice.get("parameters") or {}),
            ("parameters", content.get("parameters") or {}),
        ],
    )
    stored = {n: d for s in (*models, *([base] if base else [])) for n, d in s.dtypes.items()}
    method = MergekitMethod(kind, reader, [n for n, d in sorted(stored.items()) if d.is_floating_point], content, path)
    if kind.card is Slerp:
        assert base is not None
        models = [base, *models]
        base = None
    return {
        "base": base,
        "models": models,
        "method": method,
        "weights": reader.constant_weights() if kind.each else None,
        "dtype": _dtype(content.get("out_dtype") or content.get("dtype"), "dtype"),
    }


class MergekitMethod(ElementwiseMethod):
    """A method whose options and weights depend on the tensor, as a mergekit configuration says."""

    def __init__(
        self, kind: _Kind, reader: Parameters, names: Iterable[str], content: Mapping[str, Any], path: Path | None
    ):
        self.card = kind.card.card  # type: ignore[attr-defined]
        self.models, self.needs_base = kind.card.models, kind.card.needs_base  # type: ignore[misc]
        self.order_free = kind.card.order_free  # type: ignore[misc]
        options = self.card.options
        if kind.card is Ties:
            options = {**options, "trim": "tensor", "zero_sign": "positive"}
        if kind.card is Dare:
            options = {**options, "consensus": "sum" if content["merge_method"] == "dare_ties" else "none"}
        self.recorded = {**options, "mergekit": _named(content)}
        self._path = path
        self._rules: dict[str, tuple[ElementwiseMethod, tuple[float, ...]]] = {}
        built: dict[str, ElementwiseMethod] = {}
        depths = layer_depths(names)
        for name, depth in depths.items():
            whole, each = reader.values(name, depth)
            key = repr((whole, each))
            if key not in built:
                try:
                    built[key] = kind.build(whole, each)
                except OptionError as e:
                    raise OptionError(f"{content['merge_method']} at tensor {name!r}: {e}") from None
            self._rules[name] = built[key], tuple(e["weight"] for e in each) if kind.each else ()
        self._methods = list(built.values())

    @property
    def files(self) -> list[Path] | None:
        return None if self._path is None else [self._path]

    def prepare(self, scan: Scan) -> dict[int, Any]:
        return {id(m): m.prepare(scan) for m in self._methods}

    def measure(self, pieces: Pieces, ctx: TensorContext) -> Any:
        return self._rules[ctx.name][0].measure(pieces, self._own(ctx))

    def shows_nonfinite(self, ctx: TensorContext) -> bool:
        return self._rules[ctx.name][0].shows_nonfinite(self._own(ctx))

    def piece(self, base: Tensor | None, tuned: Sequence[Tensor], ctx: TensorContext) -> Tensor:
        return self._rules[ctx.name][0].piece(base, tuned, self._own(ctx))

    def _own(self, ctx: TensorContext) -> TensorContext:
        """What the tensor's rule sees."""
        rule, weights = self._rules[ctx.name]
        return replace(ctx, weights=weights or ctx.weights, shared=ctx.shared[id(rule)])


def _kind(content: Mapping[str, Any]) -> _Kind:
    id = content.get("merge_method")
    if id not in _KINDS:
        todo = "merge_method names a method that mergekit and deltaw share; deltaw's own take no mergekit YAML."
        raise unknown_name("merge_method", str(id), _KINDS, todo)
    return _KINDS[str(id)]


def _open(name: Any, where: str, folder: Path, opened: dict[str, Source], base: Source | None = None) -> Source:
    """The model that a name stands for: a model's path, an adapter's on `base`, or `path+adapter`; opened once each."""
    if not isinstance(name, str):
        raise OptionError(f"{where}: {name!r}; expected the path of a model")
    if name not in opened:
        whole = _path(name, folder)
        if whole is None and "@" in name:
            raise OptionError(f"{where}: {name!r} names a revision on a hub; download it and give the folder")
        model, plus, adapter = name.partition("+")
        if whole is not None or not plus:
            opened[name] = open_source(whole or name, where, base)
        else:
            below = _open(model, where, folder, opened)
            opened[name] = open_source(_path(adapter, folder) or adapter, where, below)
    return opened[name]


def _path(name: str, folder: Path) -> Path | None:
    """The path where there is something, seen from here or from the configuration's folder."""
    places = (Path(name).expanduser(), folder / Path(name).expanduser())
    return next((p for p in places if p.exists()), None)


def _whole_models(layer_range: Any, where: str, source: Source) -> None:
    """Raise OptionError where a slice takes only a part of a model's layers."""
    numbers = [int(m[1]) for m in map(LAYER.search, source.shapes) if m]
    count = max(numbers) + 1 if numbers else 0
    if layer_range != [0, count]:
        raise OptionError(
            f"{where}.layer_range: {layer_range!r}; only whole models are supported, which is [0, {count}] for "
            f"{source.label}"
        )


def _named(found: Any, key: str = "") -> Any:
    """The configuration with models by their names, not by their paths, for the model card."""
    if isinstance(found, Mapping):
        return {k: _named(v, str(k)) for k, v in found.items()}
    if isinstance(found, list):
        return [_named(v, key) for v in found]
    if key in ("model", "base_model", "source", "tokenizer_source") and isinstance(found, str):
        return "+".join(Path(part).name for part in found.split("+"))
    return found


def _dtype(value: Any, where: str) -> torch.dtype | None:
    try:
        return floating_dtype(value)
    except OptionError as e:
        raise OptionError(f"{where}: {e}") from None


def _tokenizer(content: Mapping[str, Any], base_name: Any, base: Source | None, models: Sequence[Source]) -> None:
    """Check that the tokenizer asked for is the base's, and that all models have its vocabulary."""
    if content.get("chat_template") is not None:
        raise OptionError("chat_template: this key is not supported; the output takes the base's")
    asked = []
    if content.get("tokenizer") is not None:
        only(content["tokenizer"], "tokenizer", ("source",))
        asked.append(("tokenizer.source", content["tokenizer"].get("source")))
    if content.get("tokenizer_source") is not None:
        asked.append(("tokenizer_source", content["tokenizer_source"]))
    for where, source in asked:
        if source not in ("base", base_name):
            raise OptionError(f"{where}: {source!r}; only 'base' is supported, for models of one vocabulary")
        first, *rest = [s for s in (base, *models) if s is not None]
        for other in rest:
            if _vocabulary(first) != _vocabulary(other):
                raise CheckpointError(
                    f"{where}: the tokenizers of {first.label} and {other.label} differ, so their embeddings do not "
                    "belong together row by row; give them one vocabulary first"
                )


def _vocabulary(source: Source) -> Any:
    """The tokens of tokenizer.json with their numbers; None without that file."""
    path = None if source.folder is None else source.folder / "tokenizer.json"
    if path is None or not path.is_file():
        return None
    content = read_json(path)
    model = content.get("model")
    added = [[t.get("id"), t.get("content")] for t in content.get("added_tokens") or () if isinstance(t, dict)]
    return [model.get("vocab") if isinstance(model, dict) else None, added]
