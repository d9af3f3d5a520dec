"""Closed forms of svd, svd-llm and lord against numpy-free float64 definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaw.compress import LORD, SVD, SVDLLM, Decomposition, Layer
from deltaw.errors import DataError, NonFiniteError, OptionError
from deltaw.linalg import weighted_svd
from deltaw.models import capture, find_sites
from tolerances import TOLERANCES


def layer_of(weight, x=None, bias=None):
    """A Layer with float64 statistics of inputs x [t, n]."""
    m, n = weight.shape
    model = nn.Sequential(nn.Linear(n, m, bias=bias is not None, dtype=torch.float64))
    model[0].weight.data.copy_(weight)
    if bias is not None:
        model[0].bias.data.copy_(bias)
    site = find_sites(model, "0")[0]
    stats = None
    if x is not None:
        kinds = ("input_cov", "input_mean", "output_cov", "output_mean")
        stats = capture(model, [site], [x], kinds, dtype=torch.float64)
    return Layer.of(model, site, stats)


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(7, 10, generator=g, dtype=torch.float64)
    x = (
        torch.randn(50, 10, generator=g, dtype=torch.float64) @ torch.randn(10, 10, generator=g, dtype=torch.float64)
        + 2
    )
    b = torch.randn(7, generator=g, dtype=torch.float64)
    return w, x, b


def product(method, layer, rank):
    f = method.factors(layer, method.decompose(layer), rank)
    return f.dense(), f.bias


def output_error(w, approx, x):
    return float(((w - approx) @ x.mT).square().sum())


def test_svd_of_a_diagonal(evidence):
    w = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    approx, _ = product(SVD(), layer_of(w), 2)
    error = float((approx - torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64))).abs().max())
    assert error < 1e-14
    evidence("svd", kind="closed form", peer="definition", error=error)


def test_svd_error_is_the_tail_of_the_spectrum(problem, evidence):
    w, _, _ = problem
    s, d = torch.linalg.svdvals(w), SVD().decompose(layer_of(w))
    for rank in range(1, 8):
        approx = d.left[:, :rank] @ d.right[:rank]
        assert torch.linalg.matrix_rank(approx) == rank
        error = abs(float((w - approx).square().sum()) - float(s[rank:].square().sum()))
        assert error < 1e-12
        assert abs(float(d.squared_errors()[rank]) - float(s[rank:].square().sum())) < 1e-12
        evidence("svd", kind="closed form", peer="definition", error=error)


@pytest.mark.parity
def test_svd_equals_scikit_learn(problem, evidence):
    decomposition = pytest.importorskip("sklearn.decomposition")
    import sklearn

    w, _, _ = problem
    peer = decomposition.TruncatedSVD(3, algorithm="arpack").fit(w.numpy())
    theirs = torch.from_numpy(peer.transform(w.numpy()) @ peer.components_)
    error = float((product(SVD(), layer_of(w), 3)[0] - theirs).abs().max())
    assert error < TOLERANCES["compress-svd"][0]
    evidence("svd", kind="parity", peer=f"scikit-learn {sklearn.__version__}", error=error)


def test_svd_llm_drops_exactly_sigma(problem, evidence):
    w, x, _ = problem
    layer, method = layer_of(w, x), SVDLLM(damping=0.0)
    d = method.decompose(layer)
    for rank in range(1, 8):
        approx = d.left[:, :rank] @ d.right[:rank]
        reached, promised = output_error(w, approx, x) / len(x), float(d.squared_errors()[rank])
        assert reached == pytest.approx(promised, rel=1e-10, abs=1e-12)
        evidence("svd-llm", kind="closed form", peer="definition", error=abs(reached - promised))
        svd, _ = product(SVD(), layer, rank)
        assert reached <= output_error(w, svd, x) / len(x) * (1 + 1e-12) + 1e-12


def test_svd_llm_equals_weighted_svd_and_the_cholesky_form(problem):
    w, x, _ = problem
    approx, _ = product(SVDLLM(damping=0.0), layer_of(w, x), 3)
    gram = x.mT @ x / len(x)
    found = weighted_svd(w, right=gram, rank=3)
    assert torch.allclose(approx, found.left @ found.right, atol=1e-10)
    c = torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(w @ c, full_matrices=False)
    whitened = (u[:, :3] * s[:3]) @ torch.linalg.solve_triangular(c, vh[:3], upper=False, left=False)
    assert torch.allclose(approx, whitened, atol=1e-10)


def test_svd_llm_with_orthonormal_inputs_is_svd(problem):
    w, x, _ = problem
    q = torch.linalg.qr(x)[0]
    for method in (SVDLLM(), SVDLLM(damping=0.0)):
        assert torch.allclose(product(method, layer_of(w, q), 4)[0], product(SVD(), layer_of(w), 4)[0], atol=1e-10)


@pytest.mark.parametrize("shape", [(7, 10), (10, 7), (6, 6)])
def test_svd_llm_bears_a_rank_deficient_gram(shape):
    """Three tokens: nothing lost on them from rank 3 on, and what they do not see is ordered by the weight."""
    m, n = shape
    g = torch.Generator().manual_seed(1)
    w, x = torch.randn(m, n, generator=g, dtype=torch.float64), torch.randn(3, n, generator=g, dtype=torch.float64)
    layer = layer_of(w, x)
    for rank in range(3, min(m, n) + 1):
        approx, _ = product(SVDLLM(), layer, rank)
        assert bool(torch.isfinite(approx).all())
        assert output_error(w, approx, x) < 1e-5 * float((w @ x.mT).square().sum())
    assert torch.allclose(approx, w, atol=1e-4)  # the full rank gives back W, unlike a pseudo-inverse
    zero = layer_of(w, torch.zeros(4, n, dtype=torch.float64))
    assert bool(torch.isfinite(product(SVDLLM(), zero, 2)[0]).all())


def test_lord_error_mean_and_full_rank(problem, evidence):
    w, x, b = problem
    layer, method = layer_of(w, x, b), LORD()
    y = x @ w.mT + b
    eigenvalues = torch.linalg.eigvalsh((y - y.mean(0)).mT @ (y - y.mean(0)) / len(x)).flip(0)
    for rank in range(1, 8):
        approx, bias = product(method, layer, rank)
        found = x @ approx.mT + bias
        error = abs(float((found - y).square().sum()) / len(x) - float(eigenvalues[rank:].sum()))
        assert error < 1e-10 * float(eigenvalues.sum())
        assert torch.allclose(found.mean(0), y.mean(0), atol=1e-12)  # the mean is kept at every rank
        evidence("lord", kind="closed form", peer="definition", error=error)
    assert torch.allclose(approx, w, atol=1e-12)
    assert torch.allclose(bias, b, atol=1e-12)


def test_lord_uncentred_equals_svd_llm(problem, evidence):
    w, x, b = problem
    layer = layer_of(w, x)
    for rank in (1, 3, 6):
        ours, bias = product(LORD(centred=False), layer, rank)
        theirs, _ = product(SVDLLM(damping=0.0), layer, rank)
        assert bias is None
        error = float((ours - theirs).abs().max())
        assert error < 1e-9
        evidence("lord", kind="closed form", peer="svd-llm, uncentred", error=error)
    biased = layer_of(w, x, b)
    approx, bias = product(LORD(centred=False), biased, 3)
    vectors = torch.linalg.eigh((x @ w.mT + b).mT @ (x @ w.mT + b)).eigenvectors[:, -3:]
    projected = (x @ w.mT + b) @ vectors @ vectors.mT
    assert torch.allclose(x @ approx.mT + bias, projected, atol=1e-9)


def test_lord_is_better_than_uncentred_when_the_mean_is_large(problem):
    w, x, b = problem
    layer = layer_of(w, x + 10, b)
    y = (x + 10) @ w.mT + b

    def error(method):
        approx, bias = product(method, layer, 2)
        return float(((x + 10) @ approx.mT + bias - y).square().sum())

    assert error(LORD()) < error(LORD(centred=False)) < error(SVD())


def test_local_update_fits_the_inputs_of_the_compressed_model(problem):
    w, x, _ = problem
    factors = SVDLLM().factors(layer_of(w, x), SVDLLM().decompose(layer_of(w, x)), 3)
    moved = x @ torch.diag(torch.linspace(0.2, 3, 10, dtype=torch.float64))
    method = SVDLLM(local_update=True)
    fitted = method.refit(layer_of(w, moved), factors)
    z = moved @ factors.right.mT
    least = torch.linalg.lstsq(z, moved @ w.mT).solution.mT  # L* of the paper
    assert torch.allclose(fitted.left, least, atol=1e-8)
    assert output_error(w, fitted.dense(), moved) < output_error(w, factors.dense(), moved)


def test_missing_and_non_finite_input(problem):
    w, x, _ = problem
    with pytest.raises(DataError, match="input_cov"):
        SVDLLM().decompose(layer_of(w))
    layer = layer_of(w, x)
    layer.stats._moments["input", "0"].scatter[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="input_cov"):
        SVDLLM().decompose(layer)
    w = w.clone()
    w[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        layer_of(w)
    with pytest.raises(OptionError, match="damping"):
        SVDLLM(damping=-1.0)


def test_squared_errors_of_a_decomposition():
    d = Decomposition(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([3.0, 2.0], dtype=torch.float64))
    assert d.squared_errors().tolist() == [13.0, 4.0, 0.0]
