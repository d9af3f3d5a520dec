"""The k-th largest magnitude of very many numbers, in pieces, without sorting them.

Float32 magnitudes order like their bit patterns, so two histograms find the k-th largest exactly: one over the
upper 15 bits of all numbers, one over the lower 16 bits of those in the bin that holds it. Counts of pieces add
up, so the numbers may live in as many tensors, files or processes as they like.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.errors import OptionError

UPPER_BINS = 1 << 15
LOWER_BINS = 1 << 16
_CHUNK = 1 << 16  # numbers counted at a time: the count takes about 24 bytes for each


def magnitude_counts(x: Tensor, upper: int | None = None) -> Tensor:
    """Counts of |x|, as float32, by the upper 15 bits; with `upper`, of those in that bin by the lower 16 bits.

    Args:
        x: any shape, finite. Wider dtypes are rounded to float32.
        upper: None for the first histogram, [32768]; a bin of it for the second, [65536].

    Returns:
        int64 counts on the CPU; bin order is magnitude order.
    """
    counts = torch.zeros(UPPER_BINS if upper is None else LOWER_BINS, dtype=torch.int64)
    for piece in x.detach().flatten().split(_CHUNK):
        bits = piece.to(torch.float32).abs().view(torch.int32)
        if upper is None:
            bits = bits >> 16
        else:
            bits = bits[(bits >> 16) == upper] & 0xFFFF
        counts += torch.bincount(bits, minlength=len(counts)).cpu()
    return counts


def select_bin(counts: Tensor, k: int) -> tuple[int, int]:
    """(bin that holds the k-th largest, its rank from the top inside that bin), k from 1 to the sum of counts."""
    total = int(counts.sum())
    if not 1 <= k <= total:
        raise OptionError(f"k is {k}; expected 1 to {total}, the count of numbers")
    from_top = counts.flip(0).cumsum(0)
    i = int(torch.searchsorted(from_top, torch.tensor(k)))
    return len(counts) - 1 - i, k - (int(from_top[i - 1]) if i else 0)


def magnitude_of_bins(upper: int, lower: int) -> float:
    """The float32 magnitude whose bit pattern is (upper, lower)."""
    return float(torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32))


def kth_magnitude(x: Tensor, k: int) -> float:
    """The k-th largest of |x|, exact for float32 and narrower; O(numel) time, constant extra memory.

    Example:
        >>> kth_magnitude(torch.tensor([0.5, -3.0, 2.0]), 2)
        2.0
    """
    upper, rank = select_bin(magnitude_counts(x), k)
    lower, _ = select_bin(magnitude_counts(x, upper), rank)
    return magnitude_of_bins(upper, lower)
