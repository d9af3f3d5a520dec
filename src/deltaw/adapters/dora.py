"""DoRA: LoRA changes the direction of each row, a trained magnitude its length.

V = W + s·B A, c_i = ‖V_i‖₂ (one per output row, detached), W' = diag(p/c) V with trained p [m], p = ‖W_i‖ at the start,
so ΔW = W' − W = 0 there. Forward without forming V: y = (p/c)∘(x Wᵀ + s (x Aᵀ) Bᵀ). The row norms come from
c² = ‖W_i‖² + 2s·rowsum((W Aᵀ)∘B) + s²·rowsum((B A Aᵀ)∘B): 2mnr operations a step and nothing of the size of W.

Cost: r(m+n) + m trained numbers; LoRA's operations + 2mnr a step; saves x, T·r and y [T, m]. ΔW has full rank in
general. Paper: arXiv:2402.09353, eqs. 5 and 11 (detached norm).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapters.base import BaseOp, LazyBase, Structure, copy_into
from deltaw.adapters.fused import low_rank
from deltaw.adapters.lora import LoRA
from deltaw.catalogue import method
from deltaw.models import Site


@method(
    "dora",
    family="adapters",
    paper="arXiv:2402.09353",
    title="DoRA: Weight-Decomposed Low-Rank Adaptation",
    summary="LoRA on the direction of each row of the weight, and a trained magnitude per row",
    trainable="r*(m+n) + m",
    tags={"low-rank", "magnitude", "weight-form"},
    peers={"peft": "LoraConfig(use_dora=True)"},
    default_lr=2e-4,
    lr_range=(5e-5, 2e-3),
    refuses={"export": "ΔW has full rank: a LoRA export is a truncation; fold it instead"},
)
class DoRA(LoRA):
    """Options as LoRA's: `alpha`, `scaling`, `dropout` (of the whole input), `init` of A, `recompute`."""

    form = "weight"
    supports = Structure.supports
    row_norm2: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        scaling: str = "standard",
        dropout: float = 0.0,
        init: str = "kaiming",
        recompute: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(
            site, rank=rank, alpha=alpha, scaling=scaling, dropout=dropout, init=init, recompute=recompute, dtype=dtype
        )
        self.magnitude = nn.Parameter(torch.empty(self.m, dtype=dtype))
        # ‖W_i‖²: part of the frozen weight, so rebuilt from it on load and never saved
        self.register_buffer("row_norm2", torch.empty(self.m, dtype=dtype), persistent=False)
        self._kept: tuple[Any, Tensor] | None = None

    @torch.no_grad()
    def initialise(self, base: BaseOp, generator: torch.Generator, stats: Any = None) -> None:
        super().initialise(base, generator, stats)
        self.restore(base)
        self.magnitude.copy_(self.row_norm2.sqrt())

    @torch.no_grad()
    def restore(self, base: BaseOp) -> None:
        self.row_norm2.copy_(self.weight(base).square().sum(1))

    def ratio(self, base: BaseOp) -> Tensor:
        """p / c [m], differentiable in p alone."""
        with torch.no_grad():
            a, b = self.A, self.B
            wa = base.matmul(a.to(base.dtype)).to(b.dtype)  # (W Aᵀ)ᵀ [r, m]
            c2 = self.row_norm2 + 2 * self.s * (wa.mT * b).sum(1) + self.s**2 * ((b @ (a @ a.mT)) * b).sum(1)
            c = c2.clamp_min(torch.finfo(c2.dtype).tiny).sqrt()
        return self.magnitude / c

    def forward(self, x: Tensor, base: BaseOp, y: LazyBase, scale: Tensor) -> Tensor:
        if self.dropout and self.training:  # the base term must see the dropped input too
            x = F.dropout(x, self.dropout)
            y = LazyBase(base, x)
        v = low_rank(x, self.A, self.B, base, y, scale=scale * self.s, recompute=self.recompute)
        ratio = self.ratio(base) if torch.is_grad_enabled() or self.training else self._kept_ratio(base)
        return v * ratio.to(v.dtype)

    def _kept_ratio(self, base: BaseOp) -> Tensor:
        """For evaluation: computed once and kept until a parameter changes."""
        if torch.compiler.is_compiling():
            return self.ratio(base)
        key = (base.dtype, *((p.data_ptr(), p._version) for p in (self.A, self.B, self.magnitude)))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self.ratio(base))
        return self._kept[1]

    def delta(self, base: BaseOp) -> Tensor:
        w, change = self.weight(base), self.s * (self.B @ self.A)
        ratio = (self.magnitude / (w + change.detach()).norm(dim=1).clamp_min(torch.finfo(w.dtype).tiny))[:, None]
        return (ratio - 1) * w + ratio * change

    def factors(self, base: BaseOp) -> tuple[Tensor, Tensor] | None:
        return None

    def rows(self, ids: Tensor, base: BaseOp) -> Tensor:
        return F.embedding(ids, self.delta(base))

    def peft_refusal(self, site: Site) -> str:
        return "" if site.kind in ("linear", "conv1d") else f"peft norms the rows of a {site.kind} differently"

    def peft_tensors(self, site: Site) -> dict[str, Tensor]:
        return super().peft_tensors(site) | {"lora_magnitude_vector": self.magnitude}

    def load_peft(self, tensors: dict[str, Tensor], site: Site) -> None:
        super().load_peft(tensors, site)
        copy_into(self.magnitude, tensors.pop("lora_magnitude_vector").flatten(), "lora_magnitude_vector")

    def peft_config(self) -> dict[str, Any]:
        return super().peft_config() | {"use_dora": True}
