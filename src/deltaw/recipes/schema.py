"""The recipe format: YAML checked against a schema, with errors that name the line and the nearest valid key."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltaw.errors import OptionError, nearest, unknown_name

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


#: the method of the baseline, which is no structure and no optimizer
PROBE = "linear-probe"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataPart(_Part):
    """Which tasks, and how many sentences of each."""

    domains: list[str] = Field(min_length=1)
    train: Positive = 1000
    validation: int = Field(default=100, ge=0)
    test: Positive = 600
    max_length: Positive = 64


class HeadPart(_Part):
    """The one head initialisation that all tasks share.

    "random": drawn from `seed`. "probe": logistic regression on what the classifier sees of the first `sentences`
    training sentences of every domain together, with the base as it is (linear probing before fine-tuning,
    arXiv:2202.10054).
    """

    init: Literal["random", "probe"] = "random"
    seed: int = 0
    sentences: Positive = 200


class AdaptPart(_Part):
    """One way to adapt the base to each task."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    method: str
    optimizer: str = "adamw"
    parameters: Literal["all", "matrices"] = "all"
    targets: str | list[str] = "all-linear"
    lr: float | None = Field(default=None, gt=0)
    epochs: float = Field(default=2.0, gt=0)
    batch_size: Positive = 32
    options: dict[str, Any] = {}
    optimizer_options: dict[str, Any] = {}


class MergeMethodPart(_Part):
    """One merge method; `tune` lists values of its options to choose from by validation loss."""

    method: str
    options: dict[str, Any] = {}
    tune: dict[str, list[float]] = {}


class MergePart(_Part):
    """Which tuned models are merged, and how."""

    models: str
    methods: list[MergeMethodPart] = Field(min_length=1)


class CompressPart(_Part):
    """How the merged model's linear layers shrink. `ratio` is the kept share of their parameters in total."""

    model: str = "best"
    ratio: Fraction = 0.6
    allocation: Literal["uniform", "energy", "loss"] = "uniform"
    calibration: Positive = 200
    methods: list[str] = Field(min_length=1)
    latency_batches: list[Positive] = [1, 64]
    latency_repeats: Positive = 10


class InspectPart(_Part):
    """Which adapted models are inspected against the base."""

    models: list[str] = Field(min_length=1)
    top_k: Positive = 10
    epsilon: Fraction = 0.5


class Recipe(_Part):
    """A whole pipeline. Stages that are left out are skipped, as are those that build on them."""

    name: str
    title: str = ""
    model: str
    pooling: Literal["mean"] | None = None
    seed: int = 0
    threads: int | None = Field(default=None, gt=0)
    workers: int | None = Field(default=None, gt=0)
    data: DataPart
    head: HeadPart = HeadPart()
    adapt: list[AdaptPart] = Field(min_length=1)
    merge: MergePart | None = None
    compress: CompressPart | None = None
    inspect: InspectPart | None = None

    @model_validator(mode="after")
    def _references(self) -> Recipe:
        names = [a.name for a in self.adapt]
        merging = [m.method for m in self.merge.methods] if self.merge else []
        shrinking = self.compress.methods if self.compress else []
        for what, listed in (("adapt names", names), ("merge methods", merging), ("compress methods", shrinking)):
            if len(set(listed)) != len(listed):
                raise ValueError(f"{what} must differ, found {listed}")
        methods = {a.name: a.method for a in self.adapt}
        for name, method in methods.items():
            if (name == PROBE) != (method == PROBE):
                raise ValueError(
                    f"the adaptation {name!r} has method {method!r}; {PROBE!r} is the name of its method alone"
                )
        wanted = ([self.merge.models] if self.merge else []) + (self.inspect.models if self.inspect else [])
        for name in wanted:
            if name not in names or name == PROBE:
                raise ValueError(f"{name!r} is not the name of an adapted model; adapt has {names}")
        if self.merge and methods[self.merge.models] != "full":
            full = [n for n, m in methods.items() if m == "full"]
            raise ValueError(
                f"merge.models is {self.merge.models!r}, which trains no whole model; adapt has {full} that do"
            )
        if self.compress and not self.merge:
            raise ValueError("compress needs a merge stage to take its model from")
        if self.compress and self.merge:
            known = ["best", *merging]
            if self.compress.model not in known:
                raise ValueError(f"compress.model is {self.compress.model!r}; expected one of {known}")
        return self


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with deltaw."""
    return sorted(
        f.name.removesuffix(".yaml")
        for f in resources.files("deltaw.recipes").joinpath("builtin").iterdir()
        if f.name.endswith(".yaml")
    )


def load_recipe(recipe: str | Path, mode: str = "default", seed: int | None = None) -> Recipe:
    """Read a recipe by built-in name or file, in one of its modes.

    A recipe file may hold `quick:` and `full:` with changes to its other keys: mappings are merged key by key,
    entries of lists replaced as a whole.

    Raises:
        OptionError: not a recipe; the message names the line, the key and the nearest valid one.
    """
    name, text = _text(recipe)
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise OptionError(f"recipe {name!r}{where} is not YAML: {getattr(e, 'problem', None) or e}") from None
    if not isinstance(raw, dict):
        raise OptionError(
            f"recipe {name!r}, line 1: expected keys and values (name, model, data, adapt, …), found {type(raw).__name__}"
        )
    variants = {m: raw.pop(m, None) or {} for m in ("quick", "full")}
    if mode != "default":
        if mode not in variants:
            raise unknown_name("mode", mode, ["default", "quick", "full"])
        raw = _overlay(raw, variants[mode])
    if seed is not None:
        raw["seed"] = seed
    try:
        return Recipe.model_validate(raw)
    except ValidationError as e:
        prefix = (mode,) if mode != "default" else ()
        raise OptionError("\n".join(_explain(name, tree, problem, prefix) for problem in e.errors())) from None


def _text(recipe: str | Path) -> tuple[str, str]:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise OptionError(f"recipe file {str(recipe)!r} does not exist")
        try:
            return path.name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise OptionError(
                f"recipe file {str(recipe)!r} is not UTF-8 text (byte {e.start}); save it as UTF-8"
            ) from None
    if str(recipe) not in builtin_recipes():
        raise unknown_name("recipe", str(recipe), builtin_recipes(), "Give a built-in name or a .yaml file.")
    return str(recipe), resources.files("deltaw.recipes").joinpath("builtin", f"{recipe}.yaml").read_text(
        encoding="utf-8"
    )


def _overlay(base: Any, change: Any) -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        return {**base, **{k: _overlay(base.get(k), v) for k, v in change.items()}}
    return change


def _explain(name: str, tree: yaml.Node | None, problem: Any, prefix: tuple[str, ...]) -> str:
    """One sentence for one schema error."""
    path = tuple(problem["loc"])
    line = next((n for n in (_line(tree, prefix + path), _line(tree, path), _line(tree, path[:-1])) if n), 1)
    key = ".".join(str(p) for p in path) or "recipe"
    if problem["type"] == "extra_forbidden":
        close = nearest(str(path[-1]), _fields(path[:-1]))
        hint = f"; did you mean {close[0]!r}?" if close else f"; valid keys: {', '.join(_fields(path[:-1]))}"
        return f"recipe {name!r}, line {line}: unknown key {key!r}{hint}"
    if problem["type"] == "missing":
        return f"recipe {name!r}, line {line}: key {key!r} is missing"
    return (
        f"recipe {name!r}, line {line}: {key}: {problem['msg'].removeprefix('Value error, ')} (found {problem['input']!r})"
        if path
        else f"recipe {name!r}: {problem['msg'].removeprefix('Value error, ')}"
    )


def _fields(path: tuple[Any, ...]) -> list[str]:
    """Valid keys of the schema part at `path`."""
    part: Any = Recipe
    for step in path:
        if isinstance(step, int):
            continue
        annotation = part.model_fields[step].annotation
        inner = [
            a
            for a in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if not inner:
            return []
        part = inner[0]
    return list(part.model_fields)


def _line(node: yaml.Node | None, path: tuple[Any, ...]) -> int | None:
    """1-based line of the node at `path`, or None."""
    for i, step in enumerate(path):
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(step)), None)
            if pair is None:
                return None
            if i == len(path) - 1:
                return pair[0].start_mark.line + 1
            node = pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
        else:
            return None
    return node.start_mark.line + 1 if node is not None else None
