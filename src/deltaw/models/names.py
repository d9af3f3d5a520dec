"""The role of a stored tensor from its name, its shape and the folder's config.json: no model is instantiated.

`inventory` reads live modules and is the better judge. This one serves work on checkpoints, where a model may
be larger than memory or of an architecture that is not installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from deltaw.models.roles import HEAD, NORM, ROUTER, expert_layout, expert_role, role_by_name, row_blocks
from deltaw.models.sites import Site

_EMBEDDING = re.compile(
    r"(^|[._])(wte|wpe|shared|embed|embeds|embeddings?|embed_tokens|embed_positions|embd|position_ids)(_\w+)?(\.|$)"
    r"|_embeddings?(\.|$)|(class|cls|mask|pos|position|dist)_(embed|embedding|embeddings|token)s?$"
    r"|(cls|mask)_token$|relative_attention_bias|relative_position_bias"
)
#: vocabulary-sized output layers that `HEAD` (made for module paths of live models) does not list
_OUTPUT = re.compile(r"(^|\.)(predictions\.decoder|generator_lm_head|text_projection)(\.|$)")
#: model types whose projections are transformers' Conv1D, stored [in, out]
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_NAMES = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)$")


def site_from_name(name: str, shape: Sequence[int], config: Mapping[str, Any] | None = None) -> Site:
    """Kind, role, layout and row blocks of the tensor `name` with the given shape.

    Args:
        name: full tensor name as stored ("bert.encoder.layer.0.attention.self.query.weight").
        shape: stored shape.
        config: the content of config.json; explains fused projections, Conv1D layouts and expert stacks.
    """
    module, _, parameter = name.rpartition(".")
    shape = tuple(shape)
    site = Site(module, parameter, "other", "unknown", shape, reason="no rule for this name")
    view = _namespace(config)
    leaf = module.rsplit(".", 1)[-1]
    if HEAD.search(module) or _OUTPUT.search(module) or _OUTPUT.search(name):
        return replace(site, kind="linear" if len(shape) == 2 else "bias", role="head", reason="output head by name")
    if len(shape) < 2:
        if NORM.search(leaf):
            return replace(site, kind="norm", role="norm", reason="normalisation layer by name")
        if "bias" in parameter:
            return replace(site, kind="bias", role="bias", reason="bias vector")
        return replace(site, kind="vector", role="vector", reason="not a matrix")
    if len(shape) == 3 and re.search(r"expert", name, re.IGNORECASE):
        role = expert_role(parameter if parameter != "weight" else module)
        site = replace(site, kind="expert-stack", role=role)
        return site.with_layout(expert_layout(role, shape, view), "stack of expert matrices")
    if re.search(r"expert.*(^|[._])bias(es)?$", name, re.IGNORECASE):
        return replace(site, kind="bias", role="bias", reason="stack of bias vectors")
    if (_EMBEDDING.search(module) and parameter == "weight") or _EMBEDDING.search(parameter):
        # "patch_embeddings.projection" is a convolution inside an embedding module, not a table.
        if len(shape) == 4:
            return replace(site, kind="conv", role="conv", reason="convolution kernel")
        if not re.search(r"(dense|proj|projection|linear)$", leaf):
            return replace(site, kind="embedding", role="embedding", reason="embedding table by name")
    if len(shape) >= 4 or (len(shape) == 3 and "conv" in leaf):
        if shape[1] == 1:
            return replace(site, kind="vector", role="vector", reason="one small filter per channel")
        return replace(site, kind="conv", role="conv", reason="convolution kernel")
    if len(shape) != 2:
        return replace(site, ambiguous=True, reason=f"{len(shape)}-D tensor: no rule")
    if 1 in shape:
        return replace(site, kind="vector", role="vector", reason="one row or column")
    if NORM.search(leaf):
        return replace(site, kind="norm", role="norm", reason="normalisation layer by name")
    if ROUTER.search(module):
        return replace(site, kind="linear", role="router", reason="expert router")
    site = replace(site, kind="linear")
    if getattr(view, "model_type", None) in _CONV1D_TYPES and _CONV1D_NAMES.search(module):
        site = replace(site, kind="conv1d", layout="in_out")
    if parameter == "in_proj_weight":
        rows = shape[0] // 3
        return replace(site, role="qkv", split=(rows, rows, rows), reason="fused q, k, v of nn.MultiheadAttention")
    found = role_by_name(module)
    if found is None:
        return replace(site, role="linear", reason="matrix of no special name")
    site = replace(site, role=found)
    return site.with_layout(row_blocks(found, module, *site.matrix_shape, view), "matrix by name")


def _namespace(config: Mapping[str, Any] | None) -> SimpleNamespace | None:
    """The (text) config with attribute access, as the rules for live models read it."""
    if config is None:
        return None
    inner = config.get("text_config")
    return SimpleNamespace(**{**config, **(inner if isinstance(inner, Mapping) else {})})
