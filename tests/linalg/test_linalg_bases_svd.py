"""Bases, truncated and weighted SVDs and roots of Gram matrices against float64 LAPACK."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linalg_checkers import SPECTRA, check_orthonormal, matrix, seeds, shapes, spectra

from deltaw.errors import NonFiniteError, OptionError, UnknownNameError
from deltaw.linalg import (
    bases,
    gaussian_sketch,
    gram_triplets,
    inverse_root,
    orthonormal_basis,
    psd_root,
    random_orthonormal,
    randomized_svd,
    seeded_generator,
    truncated_svd,
    weighted_svd,
)

SVD_METHODS = ("auto", "exact", "gram", "randomized")


@given(shapes, spectra, seeds, st.sampled_from(("qr", "cholesky-qr2")), st.sampled_from((1e-30, 1.0, 1e30)))
@settings(max_examples=60, deadline=None)
def test_basis_is_orthonormal_and_spans(shape, spectrum, seed, method, scale):
    x = matrix(*shape, spectrum, seed, scale)
    q = orthonormal_basis(x, method)
    assert q.shape == (shape[0], min(shape))
    check_orthonormal(q, 1e-12)
    if shape[0] >= shape[1]:  # every column of x lies in the span
        residual = x - q @ (q.mT @ x)
        assert float(residual.norm()) <= 1e-12 * float(x.norm())
    check_orthonormal(orthonormal_basis(x.float(), method), 1e-5)


@given(shapes, spectra, seeds, st.integers(0, 3), st.sampled_from((1e-30, 1.0, 1e30)))
@settings(max_examples=40, deadline=None)
def test_basis_by_sketch_is_orthonormal_and_spans(shape, spectrum, seed, extra, scale):
    """Whatever the matrix, and with sketches hardly longer than the basis or longer than the matrix."""
    x = matrix(*shape, spectrum, seed, scale)
    sketch = gaussian_sketch(min(shape[1] + extra, 60), shape[0], seeded_generator(seed), torch.float64)
    q = orthonormal_basis(x, "randomized-cholesky-qr", sketch=sketch)
    assert q.shape == (shape[0], min(shape))
    check_orthonormal(q, 1e-12)
    if shape[0] >= shape[1]:
        assert float((x - q @ (q.mT @ x)).norm()) <= 1e-12 * float(x.norm())
    check_orthonormal(orthonormal_basis(x.float(), "randomized-cholesky-qr", sketch=sketch), 1e-5)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10, 1e14])
def test_basis_by_sketch_equals_householder(condition, monkeypatch):
    """Without falling back: the sketch takes the condition away before anything is squared. One sketch for a batch."""
    m, n = 200, 20
    g = seeded_generator(0, condition)
    u, v = random_orthonormal(m, n, g, torch.float64), random_orthonormal(n, n, g, torch.float64)
    x = (u * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)) @ v
    slow = orthonormal_basis(x, "qr")
    monkeypatch.setattr(bases, "_signed_qr", None)
    fast = orthonormal_basis(torch.stack((x, 2 * x)), "randomized-cholesky-qr", sketch=gaussian_sketch(40, m, g))
    check_orthonormal(fast, 1e-13)
    assert float((fast - slow).abs().max()) < 1e-14 * condition + 1e-12
    assert float((x - fast[1] @ (fast[1].mT @ x)).norm() / x.norm()) < 1e-14


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10, 1e14])
def test_cholesky_qr2_equals_householder(condition):
    m, n = 200, 20
    g = seeded_generator(0, condition)
    u, v = random_orthonormal(m, n, g, torch.float64), random_orthonormal(n, n, g, torch.float64)
    x = (u * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)) @ v
    fast, slow = orthonormal_basis(x, "cholesky-qr2"), orthonormal_basis(x, "qr")
    check_orthonormal(fast, 1e-13)
    assert float((fast - slow).abs().max()) < 1e-14 * condition + 1e-12
    assert float((x - fast @ (fast.mT @ x)).norm() / x.norm()) < 1e-14


def test_random_orthonormal_is_haar():
    """E q = 0, E q⁴ = 3/(d(d+2)), and no sign is preferred: Householder QR alone always gives q₁₁ < 0."""
    d, draws = 5, 4000
    q = random_orthonormal(d, d, seeded_generator(0), torch.float64, batch=(draws,))
    check_orthonormal(q, 1e-13)
    assert abs(float(q[:, 0, 0].mean())) < 4 / math.sqrt(d * draws)
    assert float(q.pow(4).mean()) == pytest.approx(3 / (d * (d + 2)), rel=0.03)
    assert 0.46 < float((torch.linalg.det(q) > 0).double().mean()) < 0.54
    wide = random_orthonormal(3, 8, seeded_generator(1), torch.bfloat16)
    assert wide.shape == (3, 8)
    check_orthonormal(wide.mT, 0.02)


@given(shapes, spectra, seeds, st.sampled_from(SVD_METHODS), st.data())
@settings(max_examples=60, deadline=None)
def test_truncated_svd(shape, spectrum, seed, method, data):
    a = matrix(*shape, spectrum, seed)
    rank = data.draw(st.integers(1, min(shape)))
    u, s, vh = truncated_svd(a, rank, method)
    assert (u.shape, s.shape, vh.shape) == ((shape[0], rank), (rank,), (rank, shape[1]))
    check_orthonormal(u, 1e-10)
    check_orthonormal(vh.mT, 1e-10)
    assert bool((s[1:] <= s[:-1] + 1e-14).all())
    exact = torch.linalg.svdvals(a)
    error, best = float((a - (u * s) @ vh).norm()), float(exact[rank:].norm())
    slack = {"exact": 1e-12, "auto": 1e-12, "gram": 1e-7}.get(method)
    if slack is None:  # four power iterations on at most 40 values: a little above the optimum
        assert error <= 1.05 * best + 1e-10
    else:
        torch.testing.assert_close(s, exact[:rank], rtol=0, atol=slack * float(exact[0]) + 1e-30)
        assert error <= best + slack * float(exact[0]) + 1e-30


@pytest.mark.parametrize("method", SVD_METHODS)
@pytest.mark.parametrize("shape", [(60, 24), (24, 60), (30, 30)])
def test_signs_do_not_depend_on_the_method(shape, method):
    a = matrix(*shape, "1/k")
    u, s, vh = truncated_svd(a, 5, method)
    want_u, want_s, want_v = truncated_svd(a, 5, "exact")
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
    tolerance = 1e-2 if method == "randomized" else 1e-6
    for got, want in ((u, want_u), (s, want_s), (vh, want_v)):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    again = truncated_svd(a, 5, method)
    assert all(torch.equal(p, q) for p, q in zip((u, s, vh), again, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_svd_of_tiny_and_huge_float32(scale):
    a = (matrix(64, 20, "1/k") * scale).float()
    for method in ("gram", "exact"):
        _, s, _ = truncated_svd(a, 6, method)
        torch.testing.assert_close(s.double() / scale, 1 / torch.arange(1, 7, dtype=torch.float64), rtol=1e-5, atol=0)


@given(st.integers(1, 12), st.integers(0, 3), seeds)
@settings(max_examples=25, deadline=None)
def test_randomized_svd_is_exact_for_low_rank_and_batched(rank, power, seed):
    a = torch.stack(
        [matrix(40, 13, "gaussian", seed)[:, :rank] @ matrix(rank, 30, "gaussian", seed + i) for i in range(2)]
    )
    u, s, vh = randomized_svd(a, rank, power_iterations=power, generator=seeded_generator(seed))
    assert float((a - (u * s[..., None, :]) @ vh).abs().max()) < 1e-9
    assert u.shape == (2, 40, rank)


def test_randomized_svd_keeps_small_values():
    """Without a QR between half rounds, values below eps^(1/(2q+1)) σ₁ are lost."""
    a = matrix(80, 60, "ill-conditioned")
    s = randomized_svd(a, 20, power_iterations=4)[1]
    torch.testing.assert_close(s, torch.linalg.svdvals(a)[:20], rtol=1e-2, atol=1e-14)


def gram(n: int, seed: int, rank: int | None = None) -> torch.Tensor:
    x = matrix(n, 2 * n if rank is None else rank, "gaussian", seed)
    return x @ x.mT


@given(shapes, seeds, st.data())
@settings(max_examples=50, deadline=None)
def test_weighted_svd_reaches_its_bound(shape, seed, data):
    """‖S_L (W − L R) S_R‖_F equals the tail, for full, diagonal, missing and singular Gram matrices."""
    (m, n), w = shape, matrix(*shape, "gaussian", seed)
    rank = data.draw(st.integers(1, min(shape)))

    def draw(size):
        kind = data.draw(st.sampled_from(("none", "full", "diagonal", "singular")))
        full = gram(size, seed + size, max(1, size // 2) if kind == "singular" else None)
        return {"none": (None, torch.eye(size).double()), "diagonal": (full.diagonal(), full.diagonal().diag())}.get(
            kind, (full, full)
        )

    (left, left_gram), (right, right_gram) = draw(m), draw(n)
    found = weighted_svd(w, left, right, rank, split=data.draw(st.sampled_from(("both", "left", "right"))))
    residual = w - found.left @ found.right
    error = float(torch.trace(residual.mT @ left_gram @ residual @ right_gram).clamp_min(0).sqrt())
    scale = float(found.singular_values[0]) + 1e-12
    assert error == pytest.approx(float(found.error), abs=1e-6 * scale)
    assert found.left.shape == (m, rank)
    assert found.right.shape == (rank, n)
    # optimal: no rank-r matrix does better; compare with the plain truncation
    u, s, vh = truncated_svd(w, rank, "exact")
    other = w - (u * s) @ vh
    assert (
        float(found.error)
        <= float(torch.trace(other.mT @ left_gram @ other @ right_gram).clamp_min(0).sqrt()) + 1e-6 * scale
    )


def test_weighted_svd_depends_on_the_gram_matrix_alone():
    """Cholesky whitening, as svd-llm does it, gives the same product; identities give the plain SVD."""
    w, g = matrix(20, 30), gram(30, 1)
    c = torch.linalg.cholesky(g)
    u, s, vh = truncated_svd(w @ c, 7, "exact")
    want = torch.linalg.solve_triangular(c, (u * s) @ vh, upper=False, left=False)
    found = weighted_svd(w, right=g, rank=7)
    torch.testing.assert_close(found.left @ found.right, want, rtol=0, atol=1e-10)
    plain = weighted_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
    torch.testing.assert_close(plain.left @ plain.right, torch.diag(torch.tensor([3.0, 2.0, 0.0])).double())
    torch.testing.assert_close(plain.left.norm(dim=0), plain.right.norm(dim=1))  # balanced


@pytest.mark.parametrize("diagonal", [False, True])
def test_one_gram_matrix_serves_a_batch(diagonal):
    w, g = (
        torch.randn(*shape, generator=seeded_generator(5, shape), dtype=torch.float64) for shape in ((3, 5, 4), (4, 4))
    )
    gram = g.square().sum(0) if diagonal else g.mT @ g
    for sides in ({"right": gram}, {"left": gram}):
        batch = w if "right" in sides else w.mT
        found = weighted_svd(batch, rank=2, **sides)
        for i in range(3):
            one = weighted_svd(batch[i], rank=2, **sides)
            torch.testing.assert_close(found.left[i] @ found.right[i], one.left @ one.right)


def test_weighted_svd_batches():
    w = torch.stack([matrix(8, 10, "gaussian", i) for i in range(3)])
    g = torch.stack([gram(10, i) for i in range(3)])
    d = torch.stack([gram(8, i).diagonal() for i in range(3)])
    found = weighted_svd(w, d, g, 4)
    for i in range(3):
        one = weighted_svd(w[i], d[i], g[i], 4)
        torch.testing.assert_close(found.left[i] @ found.right[i], one.left @ one.right)
        torch.testing.assert_close(found.error[i], one.error)


@given(st.integers(1, 25), seeds, st.booleans(), st.sampled_from((1e-12, 1.0, 1e12)))
@settings(max_examples=40, deadline=None)
def test_roots(n, seed, singular, scale):
    g = gram(n, seed, max(1, n // 2) if singular else None) * scale
    root, inverse = psd_root(g)
    norm = float(torch.linalg.matrix_norm(g, 2))
    assert float((root @ root - g).abs().max()) <= 1e-12 * norm
    projector = root @ inverse
    assert float((projector @ projector - projector).abs().max()) < 1e-7
    assert float(torch.trace(projector)) == pytest.approx(max(1, n // 2) if singular else n, abs=1e-6)
    for p in (1, 2, 4):
        x = inverse_root(g, p)
        assert float((torch.linalg.matrix_power(x, p) @ g - projector).abs().max()) < 1e-5


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_coupled_newton_equals_eigh(p):
    for condition in (1e1, 1e4):
        q = random_orthonormal(30, 30, seeded_generator(p), torch.float64)
        g = (q * torch.logspace(0, -math.log10(condition), 30, dtype=torch.float64)) @ q.mT
        torch.testing.assert_close(inverse_root(g, p, method="newton"), inverse_root(g, p), rtol=1e-6, atol=1e-8)
    damped = inverse_root(torch.zeros(3, 3), p, damping=0.5, method="newton")
    torch.testing.assert_close(damped, torch.eye(3) * 0.5 ** (-1 / p))


def test_zero_gram_has_zero_roots():
    for t in (*psd_root(torch.zeros(4, 4)), inverse_root(torch.zeros(4, 4), 4)):
        assert not bool(t.any())


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_half_precision_input_is_taken(spectrum):
    a = matrix(12, 30, spectrum).bfloat16()
    u, s, _ = truncated_svd(a, 3)
    assert (u.dtype, s.dtype) == (torch.float32, torch.float32)
    assert orthonormal_basis(a).dtype == torch.bfloat16
    assert weighted_svd(a, rank=2).left.dtype == torch.float64


nan = torch.full((3, 3), float("nan"))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: truncated_svd(torch.eye(3), 4), OptionError, "rank=4"),
        (lambda: truncated_svd(torch.eye(3), 0), OptionError, "rank=0"),
        (lambda: truncated_svd(torch.eye(3), 1, "randomised"), UnknownNameError, "randomized"),
        (lambda: truncated_svd(nan, 1), NonFiniteError, "9 non-finite"),
        (lambda: randomized_svd(nan, 1), NonFiniteError, "non-finite"),
        (lambda: orthonormal_basis(nan), NonFiniteError, "non-finite"),
        (lambda: orthonormal_basis(torch.eye(3), "qrr"), UnknownNameError, "qr"),
        (lambda: orthonormal_basis(torch.eye(3), "randomized-cholesky-qr"), OptionError, "gaussian_sketch"),
        (lambda: orthonormal_basis(torch.eye(3), sketch=torch.ones(2, 3)), OptionError, "k >= 3"),
        (lambda: weighted_svd(torch.eye(3), left=torch.ones(4)), OptionError, r"\[3\]"),
        (lambda: weighted_svd(torch.eye(3), right=-torch.ones(3)), OptionError, "negative"),
        (lambda: weighted_svd(torch.eye(3), right=nan), NonFiniteError, "right"),
        (lambda: psd_root(torch.zeros(2, 3)), OptionError, "square"),
        (lambda: inverse_root(torch.eye(2), 0), OptionError, "p=0"),
        (lambda: random_orthonormal(0, 3), OptionError, "m=0"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


# -- gram_triplets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 40), (90, 40), (40, 90), (300, 280)])
@pytest.mark.parametrize("kind", ["gaussian", "decaying", "deficient"])
@pytest.mark.parametrize(("rank", "tolerance"), [(10, 0.0), (10, 5e-5), (40, 0.0)])
def test_gram_triplets_make_the_best_approximation(shape, kind, rank, tolerance):
    x = matrix(*shape).double()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    if kind != "gaussian":
        s = 10 ** (-4 * torch.arange(len(s)) / len(s)).double()
        s[12:] *= kind == "decaying"
    x = ((u * s) @ vh).float() * 1e-30  # squares would underflow
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    found_u, found_s, found_vh = gram_triplets(x, rank, tolerance)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    bound = 2 * tolerance or 1e-7
    assert float(((found_u * found_s) @ found_vh - best).norm() / best.norm()) < bound
    eye = torch.eye(rank, dtype=torch.float64)
    assert float((found_vh @ found_vh.mT - eye).abs().max()) < max(bound, 1e-6)
    sound = found_s > 1e-4 * found_s[0]
    gram = (found_u.mT @ found_u - eye)[sound][:, sound]
    assert float(gram.abs().max()) < max(bound, 1e-6) * (10 if tolerance else 1)


def test_gram_triplets_take_float32_only_where_it_keeps_the_tolerance(monkeypatch):
    seen = []
    plain = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: (seen.append(x.dtype), plain(x))[1])
    gram_triplets(matrix(80, 60).float(), 10, 5e-5)
    assert seen == [torch.float32]
    twins = torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0]))  # the border of two lies between equal values
    gram_triplets(twins, 2, 5e-5)
    assert seen[1:] == [torch.float32, torch.float64]
    gram_triplets(matrix(80, 60).double(), 10, 5e-5)
    assert seen[3:] == [torch.float64]


@pytest.mark.parametrize("tolerance", [0.0, 5e-5])
def test_gram_triplets_of_zero_are_finite_and_orthonormal(tolerance):
    x = torch.stack([torch.zeros(12, 20), matrix(12, 20).float()])
    u, s, vh = gram_triplets(x, 3, tolerance)
    assert float(s[0].abs().max()) == 0.0
    for frame in (u.mT @ u, vh @ vh.mT):
        assert torch.allclose(frame, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), atol=1e-6)
