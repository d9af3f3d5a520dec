"""Methods that work entry by entry, fed with tensors in pieces: a processor's cache and little memory hold a piece.

A piece is a run of whole rows of about `PIECE` entries, converted to the accumulation dtype when it is read, so that of
stored tensors no wider copy ever exists. What a rule must know of the whole tensor (a threshold, a norm, an angle) it
takes in `measure`, which reads the pieces as often as it needs; then `piece` makes the result piece by piece.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from deltaw.linalg import MagnitudeBracket, magnitude_counts, magnitude_of_bins, select_bin
from deltaw.merge.base import MergeMethod, TensorContext

PIECE = 1 << 18  # entries: few enough for caches, enough that workers seldom wait for the interpreter
_DEVICE_PIECE = 1 << 24  # on an accelerator a call costs more than its arithmetic
_SAMPLE = 1 << 16

#: the changes of each model in one piece, from its base and tuned entries
Changes = Callable[[Tensor | None, Sequence[Tensor]], Iterable[Tensor]]


class Pieces:
    """One tensor of the base and of the tuned models, in pieces; iterates over (base, tuned) as often as asked.

    Pieces of a matrix are matrices [r, n], those of a stack too (all its matrices' rows in a row), those of a convolution
    [r, in·k·k]; a vector's are vectors. `tuned` reads lazily, as everywhere.

    Args:
        base, tuned: as stored, of one shape; memory-mapped tensors are read when their piece is.
        dtype, device: of the pieces; None: as stored.
        size: entries of a piece; None: by the device.
        by_output: a row is all that belongs to one index of the first dimension (convolutions).
        check: called with (model or None for the base, piece) for each that is read the first time.
    """

    def __init__(
        self,
        base: Tensor | None,
        tuned: Sequence[Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        size: int | None = None,
        by_output: bool = False,
        check: Callable[[int | None, Tensor], None] | None = None,
    ):
        self._base, self.tuned, self._dtype, self._device, self._check = base, tuned, dtype, device, check
        self._by_output = by_output
        first = tuned[0] if base is None else base
        self.numel, self.ndim = first.numel(), first.ndim
        if size is None:
            size = PIECE if (device or first.device).type == "cpu" else _DEVICE_PIECE
        rows = self._rows(first)
        width = rows.shape[1] if rows.ndim == 2 else 1
        step = max(1, size // max(1, width))
        self.spans = [(a, min(a + step, len(rows))) for a in range(0, len(rows), step)] or [(0, 0)]
        self._seen: set[tuple[int | None, int]] = set()

    def __iter__(self) -> Iterator[tuple[Tensor | None, Sequence[Tensor]]]:
        base = None if self._base is None else self._rows(self._base)
        tuned = _Rows(self)
        for number, span in enumerate(self.spans):
            yield None if base is None else self._read(base, None, number, span), _Cut(self, tuned, number, span)

    def cut(self, out: Tensor) -> Iterator[Tensor]:
        """The pieces of a result, to be written to."""
        rows = self._rows(out)
        return (rows[a:b] for a, b in self.spans)

    def sample(self, count: int) -> tuple[Tensor | None, list[Tensor]]:
        """About `count` evenly spaced entries of the base and of each model, as vectors."""
        step = max(1, self.numel // count)

        def some(x: Tensor) -> Tensor:
            return x.reshape(-1)[::step].to(device=self._device, dtype=self._dtype)

        return None if self._base is None else some(self._base), [some(x) for x in self.tuned]

    def _rows(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.numel() == 0:
            return x.reshape(-1)
        return x.reshape(len(x), -1) if self._by_output else x.reshape(-1, x.shape[-1])

    def _read(self, rows: Tensor, model: int | None, number: int, span: tuple[int, int]) -> Tensor:
        x = rows[span[0] : span[1]].to(device=self._device, dtype=self._dtype)
        if self._check is not None and (model, number) not in self._seen:
            self._check(model, x)
            self._seen.add((model, number))
        return x


class _Rows(Sequence[Tensor]):
    """The tuned tensors as rows, each made once."""

    def __init__(self, pieces: Pieces):
        self._pieces, self._made = pieces, {}  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self._pieces.tuned)

    def __getitem__(self, t: Any) -> Any:
        if t not in self._made:
            self._made[t] = self._pieces._rows(self._pieces.tuned[t])
        return self._made[t]


class _Cut(Sequence[Tensor]):
    """One piece of the tuned tensors, converted when asked for."""

    def __init__(self, pieces: Pieces, tuned: _Rows, number: int, span: tuple[int, int]):
        self._pieces, self._tuned, self._number, self._span = pieces, tuned, number, span

    def __len__(self) -> int:
        return len(self._tuned)

    def __getitem__(self, t: Any) -> Any:
        if not -len(self) <= t < len(self):
            raise IndexError(t)
        return self._pieces._read(self._tuned[t], t % len(self), self._number, self._span)


class ElementwiseMethod(MergeMethod):
    """A rule entry by entry (or row by row), once `measure` has taken what it needs of the whole tensor."""

    #: False: this object's rule needs whole tensors after all, and gets them as one piece
    in_pieces: bool = True
    #: `prepare` reads whole tensors, which then decide what memory the merge takes
    prepares_whole: bool = False

    def measure(self, pieces: Pieces, ctx: TensorContext) -> Any:
        """What `piece` must know of the whole tensor; arrives as `ctx.local`. Called once for a tensor."""
        return None

    def shows_nonfinite(self, ctx: TensorContext) -> bool:
        """Whether NaN or infinity in any model always makes the same entry of the result NaN or infinite: the engine then
        looks at the models only where the result is not finite, which saves a pass over each."""
        return False

    @abstractmethod
    def piece(self, base: Tensor | None, tuned: Sequence[Tensor], ctx: TensorContext) -> Tensor:
        """The result of one piece, of its shape. Pieces come in order, each once."""

    def tensor(self, base: Tensor | None, tuned: Sequence[Tensor], ctx: TensorContext) -> Tensor:
        """The merged tensor from whole ones: a single piece."""
        pieces = Pieces(base, tuned, size=2**62, by_output=ctx.site.kind == "conv")
        return self.piece(base, tuned, replace(ctx, local=self.measure(pieces, ctx)))


def kth_magnitudes(pieces: Pieces, changes: Changes, keep: Sequence[int]) -> list[float]:
    """For each model the `keep`-th largest magnitude (infinity for 0) of its `changes` over all pieces, as float32.

    One pass where a sample of the entries tells about where it lies; else two more, over histograms.
    """
    count = pieces.numel
    found: list[float | None] = [None if k else math.inf for k in keep]
    open_ = [t for t, k in enumerate(keep) if k]
    some = list(changes(*pieces.sample(min(_SAMPLE, max(_SAMPLE // 16, count // 32)))))
    brackets = {t: MagnitudeBracket(some[t], keep[t], count) for t in open_}
    for base, tuned in pieces if open_ else ():
        for t, x in enumerate(changes(base, tuned)):
            if t in brackets:
                brackets[t].add(x)
    for t in open_:
        found[t] = brackets[t].result()
    for t in open_:
        if found[t] is None:
            upper, rank = select_bin(_counted(pieces, changes, t, None), keep[t])
            lower, _ = select_bin(_counted(pieces, changes, t, upper), rank)
            found[t] = magnitude_of_bins(upper, lower)
    return [x for x in found if x is not None]


def _counted(pieces: Pieces, changes: Changes, model: int, upper: int | None) -> Tensor:
    counts = (magnitude_counts(next(islice(changes(b, t), model, None)), upper) for b, t in pieces)
    return reduce(torch.Tensor.add_, counts)
