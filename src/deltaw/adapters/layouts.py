"""How a low-rank pair stands in peft's files, by kind of layer."""

from __future__ import annotations

from torch import Tensor

from deltaw.models import Site


def to_peft(a: Tensor, b: Tensor, site: Site) -> dict[str, Tensor]:
    """Our A [r, n], B [m, r] under peft's names and in peft's shapes."""
    if site.kind == "embedding":  # peft writes the transposed table: ΔWᵀ [e, V] = B_peft A_peft
        return {"lora_embedding_A": b.mT, "lora_embedding_B": a.mT}
    if site.kind == "conv":
        ones = (1,) * (len(site.shape) - 2)
        return {"lora_A.weight": a.reshape(-1, *site.shape[1:]), "lora_B.weight": b.reshape(*b.shape, *ones)}
    return {"lora_A.weight": a, "lora_B.weight": b}


def from_peft(tensors: dict[str, Tensor], site: Site) -> tuple[Tensor, Tensor]:
    """Inverse of `to_peft`; takes its keys out of `tensors`."""
    if site.kind == "embedding":
        return tensors.pop("lora_embedding_B").mT, tensors.pop("lora_embedding_A").mT
    a, b = tensors.pop("lora_A.weight"), tensors.pop("lora_B.weight")
    return (a.flatten(1), b.flatten(1)) if site.kind == "conv" else (a, b)
