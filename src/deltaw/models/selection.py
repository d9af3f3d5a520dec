"""Selecting sites by name, role or pattern, and overriding what was found about them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from deltaw.errors import OptionError, TargetError, nearest, unknown_name
from deltaw.models.roles import MATRIX_ROLES, ROLES
from deltaw.models.sites import Site, read_sites

_RULE_KEYS = ("role", "split", "layout", "kind", "interleaved")
_KINDS = ("linear", "conv1d", "conv", "embedding", "expert-stack", "norm", "bias", "vector", "other")


def inventory(model: nn.Module, rules: Mapping[str, Mapping[str, Any]] | None = None) -> list[Site]:
    """Every distinct parameter of `model` with its role, in the order of `named_parameters()`.

    `rules` overrides what is found, by the patterns of `find_sites`: {"*.attn.fused.weight": {"role": "qkv",
    "split": [768, 768, 768]}}; keys are role, split, layout ("out_in", "in_out"), kind and interleaved. A rule that
    matches nothing raises TargetError; one that does not fit the parameter raises OptionError.
    """
    sites = read_sites(model)
    return apply_rules(sites, rules) if rules else sites


def find_sites(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    rules: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Site]:
    """The sites that `targets` selects, for structures, compression and capture.

    Args:
        targets: "all-linear" (every hidden matrix; a fused one whose row blocks are not known is still one matrix), a
            role ("q", "mlp-out"; also "role:q"), a name suffix as peft uses ("query", "self_attn.q_proj"), a glob
            over module names ("*.layer.0.*"), a regular expression "re:…" (full match of the module name), or a list
            of these.
        exclude: the same forms, taken away again.
        rules: overrides as in `inventory`.

    Raises:
        TargetError: a pattern matches nothing (near misses are listed).
    """
    return select_sites(inventory(model, rules), targets, exclude)


def select_sites(
    sites: Iterable[Site], targets: str | Sequence[str] = "all-linear", exclude: str | Sequence[str] = ()
) -> list[Site]:
    """`find_sites` on sites that are known already, such as those of a checkpoint (see `site_from_name`)."""
    weights = [s for s in sites if len(s.shape) >= 2 and s.kind not in ("norm", "bias", "vector")]
    chosen: set[str] = set()
    for pattern in _listed(targets):
        found = {s.name for s in weights if matches(s, pattern)}
        if not found:
            raise _nothing(pattern, weights)
        chosen |= found
    for pattern in _listed(exclude):
        dropped = {s.name for s in weights if matches(s, pattern)}
        if not dropped and pattern.removeprefix("role:") not in ROLES:  # a model without such a role is no mistake
            raise _nothing(pattern, weights, "exclude")
        chosen -= dropped
    if not chosen:
        raise TargetError(f"targets {targets!r} without {exclude!r} leave no matrix; widen one or narrow the other")
    return [s for s in weights if s.name in chosen]


def matches(site: Site, pattern: str) -> bool:
    """Whether one pattern of `find_sites` selects a site."""
    if pattern == "all-linear":
        return site.is_matrix or (site.role in MATRIX_ROLES and site.kind in ("linear", "conv1d"))
    if pattern.startswith("role:"):
        role = pattern.removeprefix("role:")
        if role not in ROLES:
            raise unknown_name("role", role, ROLES)
        return site.role == role
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], site.module) is not None
        except re.error as e:
            raise OptionError(f"target {pattern!r} is not a regular expression: {e}") from None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(site.module, pattern) or fnmatch.fnmatchcase(site.name, pattern)
    if pattern in (site.module, site.name) or site.module.endswith("." + pattern):
        return True
    return site.role == pattern


def apply_rules(sites: Iterable[Site], rules: Mapping[str, Mapping[str, Any]]) -> list[Site]:
    """Sites with the overrides of `inventory`; later rules win."""
    result = list(sites)
    for pattern, changes in rules.items():
        for key in changes:
            if key not in _RULE_KEYS:
                raise unknown_name(f"key in rule {pattern!r}", key, _RULE_KEYS)
        for key, known in (("role", ROLES), ("layout", ("out_in", "in_out")), ("kind", _KINDS)):
            if key in changes and changes[key] not in known:
                raise unknown_name(f"{key} in rule {pattern!r}", str(changes[key]), known)
        hits = [i for i, s in enumerate(result) if matches(s, pattern)]
        if not hits:
            raise TargetError(
                f"rule {pattern!r} matches no parameter; near misses: {nearest(pattern, [s.name for s in result])}"
            )
        for i in hits:
            result[i] = _changed(result[i], pattern, changes)
    return result


def _changed(site: Site, pattern: str, changes: Mapping[str, Any]) -> Site:
    values: dict[str, Any] = {k: tuple(v) if k == "split" else v for k, v in changes.items()}
    role = values.get("role", site.role)
    if role != site.role and "split" not in values:
        values["split"], values["interleaved"] = (), False  # blocks of the old role say nothing about the new one
    if site.kind == "other" and "kind" not in values and role in MATRIX_ROLES:
        values["kind"] = {2: "linear", 3: "expert-stack"}.get(len(site.shape), "other")
    new = replace(site, ambiguous=False, reason=f"rule {pattern!r}", **values)
    rows = new.matrix_shape[0]
    if new.split and sum(new.split) != rows:
        raise OptionError(f"rule {pattern!r}: split {new.split} does not add up to the {rows} rows of {new.name!r}")
    if new.interleaved and len(set(new.split)) != 1:
        raise OptionError(f"rule {pattern!r}: interleaved blocks of {new.name!r} must be equal, found {new.split}")
    return new


def _listed(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _nothing(pattern: str, weights: list[Site], what: str = "target") -> TargetError:
    leaves = [s.module.rsplit(".", 1)[-1] for s in weights]
    close = nearest(pattern.removeprefix("re:"), [s.module for s in weights] + leaves + list(ROLES))
    hint = ", ".join(repr(c) for c in close) if close else "none"
    return TargetError(
        f"{what} {pattern!r} matches none of the model's {len(weights)} weight matrices; near misses: {hint}. Give a "
        "module name, its suffix, a glob, 're:…', a role or 'all-linear'."
    )
