"""Rotations, transforms, sketches, spectra and seeded streams against definitions in float64."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linalg_checkers import check_orthonormal, matrix, seeds, shapes, spectra

from deltaw.errors import NonFiniteError, OptionError
from deltaw.linalg import (
    apply_householder,
    cayley,
    cayley_neumann,
    dct,
    dct_matrix,
    effective_rank,
    gaussian_sketch,
    hadamard_matrix,
    hadamard_transform,
    householder_wy,
    idct,
    leverage_scores,
    power_iteration,
    principal_angles,
    random_orthonormal,
    seeded_generator,
    skew,
    skew_vector,
    sparse_sign_sketch,
    stable_rank,
)


def reflections(u):
    h = torch.eye(u.shape[0], dtype=u.dtype)
    for column in u.T:
        if bool(column.any()):
            h = h @ (torch.eye(u.shape[0], dtype=u.dtype) - 2 * torch.outer(column, column) / column.dot(column))
    return h


@given(st.integers(1, 20), st.integers(1, 12), seeds, st.booleans(), st.sampled_from((1e-12, 1.0, 1e12)))
@settings(max_examples=40, deadline=None)
def test_compact_wy_is_the_product_of_reflections(n, r, seed, zero_column, scale):
    u = matrix(n, r, "gaussian", seed, scale)
    if zero_column:
        u[:, r // 2] = 0
    h, eye = reflections(u), torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(apply_householder(eye, u), h, rtol=0, atol=1e-11)
    torch.testing.assert_close(apply_householder(eye, u, transpose=True), h.mT, rtol=0, atol=1e-11)
    torch.testing.assert_close(eye - u @ householder_wy(u) @ u.mT, h, rtol=0, atol=1e-11)


def test_householder_batches_and_differentiates():
    u = torch.stack([matrix(7, 3, "gaussian", i) for i in range(4)])
    x = matrix(5, 7)
    for i in range(4):
        torch.testing.assert_close(apply_householder(x, u)[i], x @ reflections(u[i]), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda t: apply_householder(x, t), (u[0].clone().requires_grad_(),))
    zero = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    apply_householder(torch.eye(4, dtype=torch.float64), zero).sum().backward()
    assert bool(zero.grad.isfinite().all())


@given(st.integers(1, 10), seeds)
@settings(max_examples=25, deadline=None)
def test_skew_and_cayley(n, seed):
    v = torch.randn(2, n * (n - 1) // 2, generator=seeded_generator(seed), dtype=torch.float64)
    s = skew(v, n)
    assert torch.equal(s, -s.mT)
    assert torch.equal(skew_vector(s), v)
    q = cayley(s)
    check_orthonormal(q, 1e-12)
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(q @ (eye - s), eye + s, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.linalg.det(q), torch.ones(2, dtype=torch.float64))


@given(st.integers(2, 10), seeds, st.integers(0, 6), st.floats(0.01, 0.6))
@settings(max_examples=40, deadline=None)
def test_neumann_error_depends_on_parity(n, seed, terms, norm):
    s = skew(torch.randn(n * (n - 1) // 2, generator=seeded_generator(seed), dtype=torch.float64), n)
    s = s * (norm / torch.linalg.matrix_norm(s, 2))
    r = cayley_neumann(s, terms)
    eye = torch.eye(n, dtype=torch.float64)
    want = cayley(s) @ (eye - torch.linalg.matrix_power(s, terms + 1))
    torch.testing.assert_close(r, want, rtol=0, atol=1e-12)
    defect = float(torch.linalg.matrix_norm(r @ r.mT - eye, 2))
    q = norm ** (terms + 1)
    assert defect == pytest.approx(q * q if terms % 2 == 0 else 2 * q + q * q, abs=1e-12) or (
        terms % 2 == 1 and abs(defect - (2 * q - q * q)) < 1e-12  # the even power of S may have either sign
    )


def test_rotation_gradients():
    s = skew(torch.randn(6, generator=seeded_generator(0), dtype=torch.float64) / 9, 4).requires_grad_()
    assert torch.autograd.gradcheck(cayley, (s,))
    assert torch.autograd.gradcheck(lambda t: cayley_neumann(t, 3), (s,))
    v = torch.randn(6, generator=seeded_generator(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: skew(t, 4), (v,))


@given(st.integers(0, 8), seeds)
@settings(max_examples=20, deadline=None)
def test_hadamard(log_n, seed):
    n = 2**log_n
    h = hadamard_matrix(n, torch.float64)
    check_orthonormal(h, 1e-13)
    assert torch.equal(h, h.mT)
    x = matrix(3, n, "gaussian", seed)
    torch.testing.assert_close(hadamard_transform(x), x @ h)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x)
    assert hadamard_transform(x.bfloat16()).dtype == torch.bfloat16


@given(st.integers(1, 70), seeds)
@settings(max_examples=30, deadline=None)
def test_dct(n, seed):
    fft = pytest.importorskip("scipy.fft")
    x = matrix(3, n, "gaussian", seed)
    c = dct_matrix(n, torch.float64)
    check_orthonormal(c, 1e-13)
    np.testing.assert_allclose(dct(x).numpy(), fft.dct(x.numpy(), norm="ortho"), atol=1e-12)
    torch.testing.assert_close(x @ c.mT, dct(x))
    torch.testing.assert_close(idct(dct(x)), x)
    torch.testing.assert_close(x @ c, idct(x))
    assert float((dct(x.bfloat16()).double() - dct(x)).abs().max()) < 0.1


def test_transforms_differentiate():
    x = matrix(2, 8).requires_grad_()
    for f in (dct, hadamard_transform, idct):
        assert torch.autograd.gradcheck(f, (x,))


def test_sketches_keep_norms_on_average():
    d, n, draws = 32, 50, 400
    x = matrix(n, 1)
    for make in (gaussian_sketch, lambda *a: sparse_sign_sketch(*a[:2], 4, a[2])):
        norms = [float((make(d, n, seeded_generator(i)).double() @ x).square().sum()) for i in range(draws)]
        spread = math.sqrt(2 / d / draws)
        assert np.mean(norms) / float(x.square().sum()) == pytest.approx(1.0, abs=4.5 * spread)


@given(st.integers(1, 30), st.integers(1, 40), seeds, st.data())
@settings(max_examples=30, deadline=None)
def test_sparse_signs(d, n, seed, data):
    nnz = data.draw(st.integers(1, d))
    s = sparse_sign_sketch(d, n, nnz, seeded_generator(seed), torch.float64)
    assert bool(((s != 0).sum(0) == nnz).all())
    torch.testing.assert_close(s.abs().amax(0), torch.full((n,), nnz**-0.5, dtype=torch.float64))
    assert torch.equal(s, sparse_sign_sketch(d, n, nnz, seeded_generator(seed), torch.float64, sparse=True).to_dense())


@given(shapes, spectra, seeds)
@settings(max_examples=40, deadline=None)
def test_leverage_scores(shape, spectrum, seed):
    a = matrix(*shape, spectrum, seed)
    scores = leverage_scores(a)
    hat = a @ torch.linalg.pinv(a, rtol=max(shape) * torch.finfo(torch.float64).eps)
    torch.testing.assert_close(scores, hat.diagonal(), rtol=0, atol=1e-3 if spectrum == "ill-conditioned" else 1e-9)
    assert float(scores.sum()) == pytest.approx(int(torch.linalg.matrix_rank(a)), abs=1e-8)


@given(shapes, spectra, seeds, st.sampled_from((1e-30, 1.0, 1e30)))
@settings(max_examples=50, deadline=None)
def test_ranks_lie_between_one_and_the_rank(shape, spectrum, seed, scale):
    x = matrix(*shape, spectrum, seed, scale)
    rank = int(torch.linalg.matrix_rank(x))
    effective, stable = float(effective_rank(x)), float(stable_rank(x))
    if spectrum == "zero":
        assert effective == stable == 0
        return
    assert 1 - 1e-9 <= stable <= effective + 1e-9 <= rank + 1e-6 + 1e-6 * min(shape)
    s = torch.linalg.svdvals(x)
    p = s / s.sum()
    assert effective == pytest.approx(float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum())), rel=1e-9)
    assert float(effective_rank(s)) == pytest.approx(effective, rel=1e-12)
    assert stable == pytest.approx(float((s / s[0]).square().sum()), rel=1e-9)


def test_flat_spectra_have_full_rank_and_batches_are_taken():
    x = torch.stack([matrix(9, 6, "flat"), 2 * matrix(9, 6, "flat", 1)])
    torch.testing.assert_close(effective_rank(x), torch.full((2,), 6.0, dtype=torch.float64))
    torch.testing.assert_close(stable_rank(x), torch.full((2,), 6.0, dtype=torch.float64))
    s = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(effective_rank(s, singular_values=True), torch.tensor([2.0, 1.0]))


@given(st.lists(st.sampled_from((0.0, 1e-12, 1e-9, 1e-4, 0.3, 1.0, 1.5, math.pi / 2)), min_size=1, max_size=4), seeds)
@settings(max_examples=40, deadline=None)
def test_principal_angles_are_accurate_at_both_ends(angles, seed):
    """arccos alone would turn 1e-9 into 0 or 1e-8."""
    k, d = len(angles), 12
    q = random_orthonormal(d, d, seeded_generator(seed), torch.float64)
    theta = torch.tensor(angles, dtype=torch.float64)
    a = q[:, :k]
    b = a * theta.cos() + q[:, k : 2 * k] * theta.sin()
    mix = matrix(k, k, "gaussian", seed) + 3 * torch.eye(k, dtype=torch.float64)
    found = principal_angles(a, b @ torch.linalg.qr(mix)[0])
    torch.testing.assert_close(found, theta.sort().values, rtol=1e-3, atol=2e-15 * 40)


def test_principal_angles_of_unequal_dimensions():
    eye = torch.eye(6)
    torch.testing.assert_close(principal_angles(eye[:, :4], eye[:, 3:5]), torch.tensor([0.0, math.pi / 2]))
    torch.testing.assert_close(principal_angles(eye[:, 3:5], eye[:, :4]), torch.tensor([0.0, math.pi / 2]))


@given(shapes, spectra, seeds, st.sampled_from((1e-30, 1.0, 1e30)))
@settings(max_examples=40, deadline=None)
def test_power_iteration_is_a_lower_bound(shape, spectrum, seed, scale):
    x = matrix(*shape, spectrum, seed, scale)
    norm = float(torch.linalg.matrix_norm(x, 2))
    found = float(power_iteration(x, 100, seeded_generator(seed)))
    assert found <= norm * (1 + 1e-12)
    assert found >= norm * (0.95 if spectrum == "gaussian" else 1 - 1e-9)


def test_streams_repeat_in_another_process_and_differ_between_tags():
    code = "from deltaw.linalg import seeded_generator as g; import torch; print(torch.rand(1, generator=g(7, 'a', 2)).item())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = torch.rand(1, generator=seeded_generator(7, "a", 2)).item()
    assert other == f"{here}\n"
    others = [(7, "a", 3), (7, "a2"), (8, "a", 2), (7,), (7, "a", "2"), (7, ("a", 2))]
    draws = {torch.rand(1, generator=seeded_generator(*key)).item() for key in others}
    assert len(draws | {here}) == len(others) + 1


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: hadamard_transform(torch.zeros(2, 6)), OptionError, "pad with zeros to 8"),
        (lambda: hadamard_matrix(0), OptionError, "power of two"),
        (lambda: dct_matrix(0), OptionError, "n=0"),
        (lambda: skew(torch.zeros(4), 3), OptionError, r"\[..., 3\]"),
        (lambda: cayley(torch.zeros(2, 3)), OptionError, "square"),
        (lambda: cayley_neumann(torch.zeros(2, 2), -1), OptionError, "terms=-1"),
        (lambda: apply_householder(torch.zeros(2, 3), torch.zeros(4, 1)), OptionError, r"x \[..., 4\]"),
        (lambda: sparse_sign_sketch(3, 4, 5), OptionError, "nnz=5"),
        (lambda: gaussian_sketch(0, 4), OptionError, "positive"),
        (lambda: effective_rank(torch.tensor([1.0, -1.0])), OptionError, "negative"),
        (lambda: effective_rank(torch.full((2, 2), float("inf"))), NonFiniteError, "4 non-finite"),
        (lambda: principal_angles(torch.zeros(3, 1), torch.zeros(4, 1)), OptionError, "subspaces"),
        (lambda: power_iteration(torch.eye(2), 0), OptionError, "steps=0"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
