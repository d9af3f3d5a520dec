"""Products that are known to be symmetric: strips on and right of the diagonal are multiplied, and then mirrored."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: below this side strips are slower than the dense product, and they stop paying beyond this many
STRIP_SIDE, _STRIPS = 256, 4


class Symmetric:
    """A matrix [s, s] on the CPU that symmetric products are written to: 5/8 of the flops with 4 strips.

    The views that a product takes are made once, as there are a hundred a product at a microsecond each; numpy mirrors in half
    of torch's time.
    """

    def __init__(self, x: Tensor):
        s = len(x)
        width = -(-s // _STRIPS) if s >= STRIP_SIDE else s
        self.spans = [(low, min(low + width, s)) for low in range(0, s, width)]
        self.x = x
        self.rows, self.columns = self._operands(x, x)
        self.strips = [x[low:high, low:] for low, high in self.spans]
        plain = x.numpy()
        self._mirrored = [(plain[high:, low:high], plain[low:high, high:].T) for low, high in self.spans[:-1]]

    def set(self, a: Tensor, b: Tensor) -> None:
        """Become A B, of plain matrices [s, k] and [k, s]."""
        self._set(*self._operands(a, b))

    def product(self, a: Symmetric, b: Symmetric) -> None:
        """Become A B."""
        self._set(a.rows, b.columns)

    def quadratic(self, r: Symmetric, a: float, b: float, c: float) -> None:
        """Become aI + bR + cR²."""
        for own, held, row, column in zip(self.strips, r.strips, r.rows, r.columns, strict=True):
            torch.addmm(held, row, column, beta=b, alpha=c, out=own)
        self._mirror()
        self.x.diagonal().add_(a)

    def _operands(self, a: Tensor, b: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What the strips take of the left and of the right factor."""
        return [a[low:high] for low, high in self.spans], [b[:, low:] for low, _ in self.spans]

    def _set(self, rows: list[Tensor], columns: list[Tensor]) -> None:
        for own, row, column in zip(self.strips, rows, columns, strict=True):
            torch.mm(row, column, out=own)
        self._mirror()

    def _mirror(self) -> None:
        for below, above in self._mirrored:
            np.copyto(below, above)


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """A B [..., s, s], known to be symmetric, of [..., s, k] and [..., k, s]; in strips where that is faster."""
    plain = a.ndim == 2 and len(a) >= STRIP_SIDE and a.device.type == "cpu"
    if not plain or a.dtype not in (torch.float32, torch.float64) or a.requires_grad or b.requires_grad:
        return a @ b
    out = Symmetric(torch.empty(len(a), len(a), dtype=a.dtype))
    out.set(a, b)
    return out.x
