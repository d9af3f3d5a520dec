"""Do these models belong together? Checks over names, shapes and configs, with messages that say what to do."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Sequence

from deltaw.errors import CheckpointError, OptionError, TargetError, nearest
from deltaw.merge.sources import Source
from deltaw.models import Site, site_from_name


def check_types(sources: Sequence[Source]) -> None:
    for s in sources:
        if not s.shapes:
            raise CheckpointError(f"{s.label} holds no tensors")
    types = [(s.label, s.config["model_type"]) for s in sources if s.config and s.config.get("model_type")]
    for label, kind in types[1:]:
        if kind != types[0][1]:
            raise CheckpointError(
                f"{label} is a model of type {kind!r}, {types[0][0]} of type {types[0][1]!r}; "
                "expected models of one architecture, fine-tuned from one base"
            )


def excluded_names(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Names that a pattern selects: a full name, a module name, a glob or `re:` with a regular expression."""
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                hits = {n for n in names if re.search(pattern[3:], n)}
            except re.error as e:
                raise OptionError(f"exclude pattern {pattern!r} is not a regular expression: {e}") from None
        else:
            hits = {n for n in names if fnmatch.fnmatchcase(n, pattern) or n.startswith(pattern + ".")}
        if not hits:
            raise TargetError(
                f"exclude pattern {pattern!r} matches none of the {len(names)} tensors; "
                f"near misses: {nearest(pattern, names)}. Give a tensor or module name, a glob or 're:…'"
            )
        found |= hits
    return found


def common_ties(sources: Sequence[Source]) -> dict[str, str]:
    """Names that every source ties to the same earlier name: a pair untied in one model is two tensors."""
    first, *rest = [s.tied() for s in sources]
    return {n: holder for n, holder in first.items() if all(r.get(n) == holder for r in rest)}


def alias_heads(sources: Sequence[Source]) -> None:
    """Let a tied head that some models store and others do not stand for the embedding in those others."""
    for name in sorted({n for s in sources for n in s.shapes}):
        holder = next((s for s in sources if name in s.shapes), None)
        if holder is None or not name.endswith(("lm_head.weight", "decoder.weight", "embed_out.weight")):
            continue
        for s in sources:
            if name in s.shapes or not (s.config or {}).get("tie_word_embeddings"):
                continue
            tables = [
                n
                for n, shape in s.shapes.items()
                if shape == holder.shapes[name] and site_from_name(n, shape, s.config).role == "embedding"
            ]
            if len(tables) == 1:
                s.alias(name, tables[0])


def shape_message(name: str, site: Site, read: Sequence[Source]) -> str:
    seen = "; ".join(f"{list(s.shapes[name])} in {s.label}" for s in read)
    text = f"tensor {name!r} has different shapes: {seen}. "
    if site.role == "embedding":
        return (
            text
            + "The vocabularies differ: resize the embeddings to one size, or keep the base's with embeddings='base'"
        )
    if site.role == "head":
        return text + "The heads differ: leave them out with heads='drop', or keep the base's with heads='base'"
    return text + "Expected models of one architecture; leave this tensor to the base with `exclude`"


def lacking_message(lacking: Sequence[str], sources: Sequence[Source], base: Source | None) -> str:
    shown = []
    for name in lacking[:4]:
        has = [s.label for s in sources if name in s.shapes]
        lacks = [s.label for s in sources if name not in s.shapes]
        shown.append(f"{name!r} is in {', '.join(has)} but not in {', '.join(lacks)}")
    more = f" (and {len(lacking) - 4} more)" if len(lacking) > 4 else ""
    text = f"{len(lacking)} tensors are not in every model: {'; '.join(shown)}{more}. "
    for a in sources:
        for b in sources:
            prefix = _prefix(a, b)
            if prefix:
                return text + (
                    f"The names of {b.label} carry the prefix {prefix!r} that those of {a.label} lack: save both from "
                    "the same model class"
                )
    if base is not None and all(name not in base.shapes for name in lacking):
        text += "The base lacks them all (heads trained on top of it?): "
    return text + (
        "missing='average' averages such tensors over the models that have them, missing='base' keeps the base's and "
        "leaves out what the base lacks"
    )


def _prefix(a: Source, b: Source) -> str:
    """The prefix p for which most names n of `a` appear as p + n in `b`; "" when there is none."""
    votes: Counter[str] = Counter()
    sample = sorted(a.shapes)[:: max(1, len(a.shapes) // 20)]
    for name in sample:
        if name in b.shapes:
            return ""
        votes.update({n[: -len(name)] for n in b.shapes if n.endswith("." + name)})
    prefix, count = votes.most_common(1)[0] if votes else ("", 0)
    return prefix if count > len(sample) // 2 else ""
