"""Where the matrices of a model are, what each is for, and how to see it as [out, in] matrices.

Roles are decided by module type, parameter identity (tied weights, the model's own input and output
embeddings) and name, never by the number of dimensions alone.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import OptionError, TargetError, nearest, unknown_name

#: role -> what it is
ROLES: dict[str, str] = {
    "q": "attention query projection",
    "k": "attention key projection",
    "v": "attention value projection",
    "o": "attention output projection",
    "qkv": "fused query, key and value projection",
    "mlp-in": "first MLP projection (up)",
    "mlp-gate": "gate of a gated MLP",
    "mlp-gate-up": "fused gate and up projection",
    "mlp-out": "second MLP projection (down)",
    "linear": "a linear layer of no known special purpose",
    "conv": "convolution kernel",
    "pooler": "pooler of an encoder",
    "embedding": "token, position or type embedding table",
    "head": "output head (LM head, classifier)",
    "router": "gate that routes tokens to experts",
    "norm": "gain or bias of a normalisation layer",
    "bias": "bias vector",
    "vector": "a vector, scalar or other parameter that is not a matrix",
    "adapter": "parameter of a deltaw structure",
    "unknown": "a parameter with two or more dimensions that no rule recognises",
}

#: roles whose weights are hidden matrices: what `all-linear` selects and what matrix optimizers take
MATRIX_ROLES = frozenset(
    {"q", "k", "v", "o", "qkv", "mlp-in", "mlp-gate", "mlp-gate-up", "mlp-out", "linear", "conv", "pooler"}
)


@dataclass(frozen=True)
class Site:
    """One parameter of a model: where it sits, what it is for, and how it reads as matrices.

    `shape` is the stored shape. `matrix_shape` is (m, n) = (out, in) of the matrix it holds: transposed for
    GPT-2's Conv1D, flattened to out x (in*kh*kw) for convolutions, per expert for stacks. `split` gives the
    sizes of the row blocks (along out) of a fused projection, () when there is one block.
    """

    module: str
    parameter: str
    kind: str  # linear | conv1d | conv | embedding | expert-stack | norm | bias | vector | other
    role: str
    shape: tuple[int, ...]
    layout: str = "out_in"  # or "in_out": stored transposed
    split: tuple[int, ...] = ()
    tied: tuple[str, ...] = ()  # further names of the same Parameter object
    module_type: str = ""
    reason: str = ""
    ambiguous: bool = False

    @property
    def name(self) -> str:
        """Full parameter name, as in `model.named_parameters()`."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def is_matrix(self) -> bool:
        """True for hidden matrices: what structures wrap and matrix optimizers update."""
        return self.role in MATRIX_ROLES and not self.ambiguous

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of the matrix, (out, in); for an expert stack, of one expert."""
        if len(self.shape) < 2:
            return (1, self.shape[0] if self.shape else 1)
        if self.kind == "conv":
            n = 1
            for d in self.shape[1:]:
                n *= d
            return (self.shape[0], n)
        m, n = self.shape[-2:]
        return (n, m) if self.layout == "in_out" else (m, n)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """View a stored weight as [m, n] (or [E, m, n] for an expert stack), sharing its memory."""
        if self.kind == "conv":
            return weight.flatten(1)
        return weight.mT if self.layout == "in_out" else weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of `as_matrix`: an [m, n] matrix in the stored layout and shape."""
        if self.kind == "conv":
            return matrix.reshape(self.shape)
        return matrix.mT if self.layout == "in_out" else matrix

    def views(self, weight: Tensor) -> list[Tensor]:
        """The independent matrices inside a stored weight, as views [m_i, n]; expert stacks as [E, m_i, n]."""
        matrix = self.as_matrix(weight)
        return list(matrix.split(self.split, dim=-2)) if self.split else [matrix]


# Trailing module names -> role. First match wins. Fused projections carry a second entry in _FUSED.
_NAME_RULES: tuple[tuple[str, str], ...] = (
    (r"(^|[._])(query_key_value|qkv_proj|qkv|wqkv|c_attn|in_proj)$", "qkv"),
    (r"(^|[._])(gate_up_proj|w13|gate_up)$", "mlp-gate-up"),
    (
        r"(attention|attn|self)[._].*(query|q_proj|q_lin|wq|to_q)$|(^|[._])(q_proj|q_lin|wq|to_q|query)$|(Attention|SelfAttention)\.q$",
        "q",
    ),
    (r"(attention|attn|self)[._].*(key|k_proj|k_lin|wk|to_k)$|(^|[._])(k_proj|k_lin|wk|to_k|key)$|Attention\.k$", "k"),
    (
        r"(attention|attn|self)[._].*(value|v_proj|v_lin|wv|to_v)$|(^|[._])(v_proj|v_lin|wv|to_v|value)$|Attention\.v$",
        "v",
    ),
    (
        r"attention\.output\.dense$|(attn|attention|self_attn)[._](o_proj|out_proj|out_lin|c_proj|wo|proj|dense|to_out)$|(^|[._])(o_proj|out_lin)$|Attention\.o$|self_attn\.out_proj$",
        "o",
    ),
    (r"(^|[._])(gate_proj|w1_gate|wi_0)$", "mlp-gate"),
    (r"(^|[._])(up_proj|c_fc|fc1|lin1|intermediate\.dense|dense_h_to_4h|wi|wi_1|linear1)$|feed_forward\.w3$", "mlp-in"),
    (
        r"(^|[._])(down_proj|fc2|lin2|dense_4h_to_h|linear2)$|mlp\.c_proj$|(^|\.)output\.dense$|DenseReluDense\.wo$|feed_forward\.w2$",
        "mlp-out",
    ),
    (r"(^|[._])pooler(\.|$)", "pooler"),
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|classifier|score|qa_outputs|output_projection|embed_out|classification_head|pre_classifier_head|head|fc_norm_head)(\.(dense|out_proj|decoder))?$"
)
_ROUTER = re.compile(
    r"(^|\.)(mlp|moe|block_sparse_moe|feed_forward|ffn)\.(gate|router|router\.(classifier|layer|weight))$|(^|\.)router$"
)
_NORM = re.compile(r"norm|(^|\.)ln(_|\d|$)", re.IGNORECASE)
_INTERLEAVED = re.compile(r"(^|[._])query_key_value$")


def inventory(model: nn.Module, rules: Mapping[str, Mapping[str, Any]] | None = None) -> list[Site]:
    """Every distinct parameter of `model` with its role, in the order of `named_parameters()`.

    `rules` overrides what is found, by name pattern (see `select`): {"*.attn.Wqkv.weight": {"role": "qkv",
    "split": [768, 768, 768]}}. A rule that matches nothing raises TargetError.
    """
    names: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for pname, p in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(id(p), []).append((path, module, pname))
    inputs, outputs = _embedding_ids(model)
    sites = []
    for entries in names.values():
        path, module, pname = entries[0]
        site = _classify(path, module, pname, getattr(module, pname), inputs, outputs, _config(model))
        others = tuple(dict.fromkeys(f"{q}.{n}" if q else n for q, _, n in entries[1:]))
        sites.append(replace(site, tied=tuple(o for o in others if o != site.name)))
    return _apply_rules(sites, rules) if rules else sites


def find_sites(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    rules: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Site]:
    """The sites that `targets` selects, for structures, compression and capture.

    Args:
        targets: "all-linear" (every hidden matrix), a role ("q", "mlp-out"; also "role:q"), a name suffix as
            peft uses ("query", "self_attn.q_proj"), a glob over module names ("*.layer.0.*"), a regular
            expression "re:…" (full match of the module name), or a list of these.
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
    chosen: dict[str, Site] = {}
    for pattern in [targets] if isinstance(targets, str) else list(targets):
        found = [s for s in weights if _matches(s, pattern)]
        if not found:
            close = nearest(
                pattern.removeprefix("re:"),
                [s.module for s in weights] + [s.module.rsplit(".", 1)[-1] for s in weights] + list(ROLES),
            )
            raise TargetError(
                f"target {pattern!r} matches none of the model's {len(weights)} weight matrices"
                + (
                    f"; near misses: {', '.join(repr(c) for c in close)}"
                    if close
                    else f"; for example {weights[0].module!r}"
                    if weights
                    else ""
                )
                + ". Give a module name, its suffix, a glob, 're:…', a role or 'all-linear'."
            )
        chosen.update({s.name: s for s in found})
    for pattern in [exclude] if isinstance(exclude, str) else list(exclude):
        for name in [n for n, s in chosen.items() if _matches(s, pattern)]:
            del chosen[name]
    if not chosen:
        raise TargetError(f"targets {targets!r} without {exclude!r} leave no matrix")
    order = {s.name: i for i, s in enumerate(weights)}
    return sorted(chosen.values(), key=lambda s: order[s.name])


def _matches(site: Site, pattern: str) -> bool:
    if pattern == "all-linear":
        return site.is_matrix
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
    if site.module == pattern or site.name == pattern or site.module.endswith("." + pattern):
        return True
    return pattern in ROLES and site.role == pattern


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "get_text_config", lambda: config)() if config is not None else None


def _embedding_ids(model: nn.Module) -> tuple[set[int], set[int]]:
    """Identities of the parameters the model itself calls input and output embeddings."""
    found: list[set[int]] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        ids: set[int] = set()
        if hasattr(model, getter):
            try:
                module = getattr(model, getter)()
            except (NotImplementedError, AttributeError):
                module = None
            weight = getattr(module, "weight", None)
            if weight is not None:
                ids.add(id(weight))
        found.append(ids)
    return found[0], found[1]


def _classify(
    path: str, module: nn.Module, pname: str, p: Tensor, inputs: set[int], outputs: set[int], config: Any
) -> Site:
    """Decide kind, role, layout and split of one parameter."""
    site = Site(path, pname, "other", "unknown", tuple(p.shape), module_type=type(module).__name__)
    if hasattr(module, "parameter_kinds"):  # a deltaw structure states the kind of each of its parameters
        kind = module.parameter_kinds().get(pname, "other")
        return replace(site, kind=kind, role="adapter", reason=f"{kind} of structure {type(module).__name__}")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or id(p) in inputs:
        return replace(site, kind="embedding", role="embedding", reason="embedding table")
    if id(p) in outputs:
        return replace(site, kind="linear", role="head", reason="the model's output embedding")
    if p.ndim < 2:
        if _NORM.search(type(module).__name__) or _NORM.search(path.rsplit(".", 1)[-1]):
            return replace(site, kind="norm", role="norm", reason="normalisation layer")
        if "bias" in pname:
            return replace(site, kind="bias", role="bias", reason="bias vector")
        return replace(site, kind="vector", role="vector", reason="not a matrix")
    if _NORM.search(type(module).__name__):
        return replace(site, kind="norm", role="norm", reason="normalisation layer")
    if isinstance(module, nn.modules.conv._ConvNd):
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            return replace(site, kind="other", role="unknown", ambiguous=True, reason="transposed convolution: no rule")
        if module.groups == module.in_channels and module.groups > 1:
            return replace(
                site, kind="vector", role="vector", reason="depthwise convolution: one small filter per channel"
            )
        return replace(site, kind="conv", role="conv", reason="convolution kernel, seen as out x (in*kernel)")
    kind, layout = _linear_kind(module, pname)
    if kind is None:
        if p.ndim == 3 and re.search(r"expert", path + "." + pname, re.IGNORECASE):
            return _expert_stack(replace(site, kind="expert-stack"), module, config)
        if isinstance(module, nn.MultiheadAttention) and pname == "in_proj_weight":
            e = module.embed_dim
            return replace(
                site, kind="linear", role="qkv", split=(e, e, e), reason="fused q, k, v of nn.MultiheadAttention"
            )
        if p.ndim == 2 and 1 in p.shape:
            return replace(site, kind="vector", role="vector", reason="one row or column")
        if re.search(r"(pos|position|cls|mask|token|relative|query_tokens|latent)", pname, re.IGNORECASE):
            return replace(site, kind="embedding", role="embedding", reason="learned table or token")
        return replace(site, ambiguous=True, reason=f"{len(p.shape)}-D parameter of {type(module).__name__}: no rule")
    site = replace(site, kind=kind, layout=layout)
    if _HEAD.search(path):
        return replace(site, role="head", reason="output head by name")
    if _ROUTER.search(path):
        return replace(site, role="router", reason="expert router")
    m, n = site.matrix_shape
    if m == 1 or n == 1:
        return replace(site, role="vector", kind="vector", reason="one row or column")
    for pattern, role in _NAME_RULES:
        if re.search(pattern, path):
            return _fused(replace(site, role=role, reason=f"{type(module).__name__} by name"), path, config)
    return replace(site, role="linear", reason=f"{type(module).__name__} of no special name")


def _linear_kind(module: nn.Module, pname: str) -> tuple[str | None, str]:
    if pname != "weight":
        return None, "out_in"
    if isinstance(module, nn.Linear):
        return "linear", "out_in"
    if hasattr(module, "nf") and any(c.__name__ == "Conv1D" for c in type(module).__mro__):
        return "conv1d", "in_out"
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return "linear", "out_in"
    return None, "out_in"


def _fused(site: Site, path: str, config: Any) -> Site:
    """Fill in the row blocks of a fused projection, or mark the site ambiguous."""
    m, _ = site.matrix_shape
    if site.role == "mlp-gate-up":
        if m % 2:
            return replace(site, ambiguous=True, reason=f"fused gate-up with an odd number of rows ({m})")
        return replace(site, split=(m // 2, m // 2), reason="fused gate and up projection")
    if site.role != "qkv":
        return site
    if _INTERLEAVED.search(path) and config is not None and getattr(config, "model_type", "") not in ("chatglm",):
        return replace(
            site, ambiguous=True, reason="query_key_value may be interleaved by heads: give a rule with `split`"
        )
    split = qkv_split(m, config)
    if split is None:
        return replace(
            site,
            ambiguous=True,
            reason=f"fused q, k, v with {m} rows that the config does not explain: give a rule with `split`",
        )
    return replace(site, split=split, reason="fused q, k, v")


def qkv_split(rows: int, config: Any) -> tuple[int, ...] | None:
    """Row blocks (q, k, v) of a fused projection from the model's config; None when they do not add up."""
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None)
    hidden = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None)
    if heads and hidden:
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        if (heads + 2 * kv) * head_dim == rows:
            return (heads * head_dim, kv * head_dim, kv * head_dim)
        return None
    return (rows // 3,) * 3 if config is None and rows % 3 == 0 else None


def _expert_stack(site: Site, module: nn.Module, config: Any) -> Site:
    """A stack [E, m, n] (or [E, n, m]) of expert matrices."""
    hidden = getattr(config, "hidden_size", None)
    a, b = site.shape[-2:]
    fused = "gate_up" in site.parameter or "w13" in site.parameter
    down = "down" in site.parameter or "w2" in site.parameter
    role = "mlp-gate-up" if fused else "mlp-out" if down else "mlp-in"
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        # The side that equals the hidden size is the input of gate/up and the output of down.
        if hidden is None or (a == b) or hidden not in (a, b):
            return replace(
                site,
                role=role,
                ambiguous=True,
                reason="expert stack whose layout (in, out) is not known: give a rule with `layout`",
            )
        transposed = (a == hidden) != down
    layout = "in_out" if transposed else "out_in"
    site = replace(site, role=role, layout=layout, reason="stack of expert matrices")
    m, _ = site.matrix_shape
    return replace(site, split=(m // 2, m // 2)) if fused and m % 2 == 0 else site


def _apply_rules(sites: Iterable[Site], rules: Mapping[str, Mapping[str, Any]]) -> list[Site]:
    result = list(sites)
    for pattern, changes in rules.items():
        unknown = set(changes) - {"role", "split", "layout", "kind"}
        if unknown:
            raise unknown_name(f"key in rule {pattern!r}", min(unknown), ["role", "split", "layout", "kind"])
        if "role" in changes and changes["role"] not in ROLES:
            raise unknown_name("role", str(changes["role"]), ROLES)
        hits = [i for i, s in enumerate(result) if _matches(s, pattern)]
        if not hits:
            raise TargetError(
                f"rule {pattern!r} matches no parameter; near misses: {nearest(pattern, [s.name for s in result])}"
            )
        for i in hits:
            site = replace(
                result[i],
                ambiguous=False,
                reason=f"rule {pattern!r}",
                **{k: tuple(v) if k == "split" else v for k, v in changes.items()},
            )
            if site.split and sum(site.split) != site.matrix_shape[0]:
                raise OptionError(
                    f"rule {pattern!r}: split {site.split} does not add up to the {site.matrix_shape[0]} rows of {site.name!r}"
                )
            result[i] = site
    return result


def tied_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Groups of names that are one and the same Parameter object (not merely equal storage)."""
    return [(s.name, *s.tied) for s in inventory(model) if s.tied]


def get_parameter(model: nn.Module, site: Site) -> torch.nn.Parameter:
    """The live Parameter of a site."""
    return getattr(model.get_submodule(site.module) if site.module else model, site.parameter)
