"""The k-th largest magnitude by histograms against sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import OptionError
from deltaw.linalg import kth_magnitude, magnitude_counts, magnitude_of_bins, select_bin


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 3000), kind=st.sampled_from(["normal", "ties", "zeros", "wide"]))
def test_equals_the_sorted_magnitudes(seed, n, kind):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    if kind == "ties":
        x = (x * 4).round() / 4
    elif kind == "zeros":
        x = torch.where(torch.rand(n, generator=g) < 0.7, 0.0, x)
    elif kind == "wide":  # subnormal to nearly overflowing
        x = x * 10.0 ** torch.empty(n).uniform_(-44, 37, generator=g)
    k = 1 + seed % n
    assert kth_magnitude(x, k) == float(x.abs().sort(descending=True).values[k - 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_exact(dtype):
    x = torch.randn(501).to(dtype)
    assert kth_magnitude(x, 100) == float(x.abs().sort(descending=True).values[99])


def test_counts_of_pieces_add_up():
    x = torch.randn(10_000)
    pieces = sum(magnitude_counts(p) for p in x.split(999))
    assert torch.equal(pieces, magnitude_counts(x))
    upper, rank = select_bin(pieces, 2000)
    lower, _ = select_bin(sum(magnitude_counts(p, upper) for p in x.split(77)), rank)
    assert magnitude_of_bins(upper, lower) == kth_magnitude(x, 2000)


@pytest.mark.parametrize("k", [0, 4])
def test_rank_outside_the_count_is_refused(k):
    with pytest.raises(OptionError, match="expected 1 to 3"):
        kth_magnitude(torch.ones(3), k)
