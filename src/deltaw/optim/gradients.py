"""Looking at the gradients once before a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.errors import CompositionError, NonFiniteError
from deltaw.optim.sharding import local, mesh_of


def usable(params: Sequence[Tensor], names: Sequence[str], nonfinite: str, *, still: bool) -> bool:
    """Whether to take a step with these gradients: decided on the device, with one number read back.

    Args:
        params, names: the parameters that have a gradient.
        nonfinite: "raise" or "skip" on NaN or infinity, in any rank's gradients.
        still: every learning rate is zero, so that zero gradients ask for nothing at all.

    Raises CompositionError on a sparse gradient, NonFiniteError.
    """
    for p, name in zip(params, names, strict=True):
        if p.grad.layout != torch.strided:  # type: ignore[union-attr]
            raise CompositionError(
                f"parameter {name!r} has a {p.grad.layout} gradient; only dense ones are supported: "  # type: ignore[union-attr]
                "use sparse=False in its embedding"
            )
    grads = [local(p.grad) for p in params]  # type: ignore[arg-type]
    norms = torch._foreach_norm(grads)
    sum_of_norms = torch.stack([x.to(norms[0].device, torch.float32) for x in norms]).sum()
    sharded = any(mesh_of(p) is not None for p in params)
    if sharded:
        torch.distributed.all_reduce(sum_of_norms)  # all ranks decide alike
    total = sum_of_norms.item()
    if total == 0 and still:
        return False
    if math.isfinite(total):
        return True
    # a finite gradient may have an infinite norm in float32: look at the entries before giving up
    bad = [name for name, g in zip(names, grads, strict=True) if not bool(g.isfinite().all())]
    count = torch.tensor(float(len(bad)), device=sum_of_norms.device)
    if sharded:
        torch.distributed.all_reduce(count)
    if count.item() == 0:
        return True
    if nonfinite == "skip":
        return False
    raise NonFiniteError(
        f"NaN or infinity in the gradients of {int(count.item())} parameters (here: {bad[:3]}); nothing was changed. Lower "
        "the learning rate, clip, check the data, or pass nonfinite='skip'"
    )
