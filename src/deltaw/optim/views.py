"""How a parameter reads as matrices: plain, transposed (Conv1D), flattened (conv), split (fused), stacked (experts).

A view is plain data, (kind, layout, split) as in `deltaw.models.Site`, so that it can stand in `param_groups`
and in a checkpoint. A fourth entry True says that the blocks of `split` alternate row by row.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deltaw.errors import OptionError
from deltaw.models import Site

View = tuple[Any, ...]
KINDS = ("linear", "conv1d", "conv", "expert-stack")


def default_view(p: Tensor, name: str) -> View:
    """The view of a parameter given without one: 2-D is a matrix, 4-D and 5-D a convolution kernel.

    Raises OptionError for everything else, with the way out.
    """
    if p.ndim == 2:
        return ("linear", "out_in", ())
    if p.ndim in (4, 5):
        return ("conv", "out_in", ())
    shape = tuple(p.shape)
    if p.ndim == 3:
        raise OptionError(
            f"parameter {name!r} of shape {shape} may be a stack of matrices or a convolution kernel: state it in the "
            "group with views=[('expert-stack', 'out_in', ()), …] or ('conv', 'out_in', ()), one entry per parameter, "
            "or let deltaw.optimizer(model, …) route the model"
        )
    raise OptionError(
        f"parameter {name!r} of shape {shape} is not a matrix: put it into a group with chain='adamw', or let "
        "deltaw.optimizer(model, …) route the model"
    )


def matrix_site(name: str, shape: tuple[int, ...], view: Any) -> Site:
    """The Site that turns tensors of this stored shape into matrices. Raises OptionError on a view that cannot fit."""
    try:
        kind, layout, split, interleaved = view if len(view) == 4 else (*view, False)
        split = tuple(int(rows) for rows in split)
    except (TypeError, ValueError):
        raise OptionError(
            f"view {view!r} of {name!r}; expected (kind, layout, split), e.g. ('linear', 'out_in', ())"
        ) from None
    module, _, parameter = name.rpartition(".")
    site = Site(module, parameter, kind, "linear", shape, layout=layout, split=split, interleaved=bool(interleaved))
    least = {"linear": 2, "conv1d": 2, "conv": 3, "expert-stack": 3}.get(kind)
    exact = kind != "conv"
    if least is None or layout not in ("out_in", "in_out"):
        raise OptionError(f"view {view!r} of {name!r}; kind is one of {KINDS}, layout 'out_in' or 'in_out'")
    if len(shape) < least or (exact and len(shape) != least):
        raise OptionError(f"view {view!r} of {name!r}: its shape {shape} is not that of a {kind}")
    if split and sum(split) != site.matrix_shape[0]:
        raise OptionError(f"view {view!r} of {name!r}: the blocks do not add up to its {site.matrix_shape[0]} rows")
    return site


def block_shapes(site: Site) -> list[tuple[int, int]]:
    """(m_i, n) of every block that `site.views` gives."""
    m, n = site.matrix_shape
    return [(rows, n) for rows in site.split] if site.split else [(m, n)]


def describe_view(site: Site) -> str:
    """A view in words, for `explain`: '3 blocks 576+192+192 x 576', '8 experts of 64 x 32', '64 x 27 flattened'."""
    m, n = site.matrix_shape
    text = " + ".join(map(str, site.split)) + f" rows x {n}" if site.split else f"{m} x {n}"
    if site.kind == "expert-stack":
        text = f"{site.shape[0]} experts of {text}"
    if site.layout == "in_out":
        text += ", stored transposed"
    return text + (", flattened" if site.kind == "conv" else "")
