"""`orthogonalize` against float64 LAPACK, on easy, hostile and broken input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from linalg_checkers import POLAR_TOLERANCE, SPECTRA, check_orthonormal, check_polar, matrix, seeds, shapes, spectra

from deltaw.errors import NonFiniteError, OptionError, UnknownNameError
from deltaw.linalg import COEFFICIENT_SETS, nuclear_norm, orthogonalize, polar
from deltaw.linalg import coefficients as coefficient_module
from deltaw.linalg._workers import share_out
from deltaw.linalg.coefficients import evaluate, resolve_coefficients
from deltaw.linalg.newton_schulz import iterate, iterate_symmetric

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
METHODS = ("auto", "polar-express", "gram-newton-schulz", "exact")


@given(shapes, spectra, seeds, st.sampled_from(DTYPES), st.sampled_from((1e-30, 1e-12, 1.0, 1e30)))
@settings(max_examples=60, deadline=None)
@example((1, 1), "gaussian", 0, torch.float32, 1e-30)
@example((300, 7), "1/k²", 0, torch.bfloat16, 1e30)
@example((8, 257), "zero", 0, torch.bfloat16, 1.0)
def test_auto_is_the_polar_factor(shape, spectrum, seed, dtype, scale):
    x = matrix(*shape, spectrum, seed, scale).to(dtype)
    out = orthogonalize(x)
    assert out.dtype == dtype
    check_polar(x.double(), out, POLAR_TOLERANCE[dtype])


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(300, 300), (260, 700), (129, 40)])
def test_large_matrices_take_the_strips_and_stay_accurate(shape, spectrum):
    """Sizes where symmetric products are cut in strips, also at a side that three does not divide."""
    x = matrix(*shape, spectrum)
    check_polar(x.float().double(), orthogonalize(x.float()), POLAR_TOLERANCE[torch.float32])
    check_polar(x.float().double(), orthogonalize(x.float(), dtype=torch.bfloat16), POLAR_TOLERANCE[torch.bfloat16])


@given(shapes, st.sampled_from(("jordan", "you", "polar-express")), seeds)
@settings(max_examples=30, deadline=None)
def test_the_iteration_is_the_scalar_polynomial(shape, name, seed):
    """In float64, U p(Σ/‖X‖_F) Vᵀ with p composed on scalars."""
    if min(shape) == 1:
        return
    x = matrix(*shape, "gaussian", seed)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    triples = resolve_coefficients(name, 5, name)
    want = (u * torch.from_numpy(evaluate(triples, (s / s.norm()).numpy()))) @ vh
    for method in ("newton-schulz", "gram-newton-schulz"):
        got = orthogonalize(x, method, 5, coefficients=name)
        assert float((got - want).abs().max()) < 1e-9


@pytest.mark.parametrize("method", ["auto", "newton-schulz", "polar-express", "gram-newton-schulz", "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_member_stays_alone(method, dtype):
    batch = torch.stack([matrix(100, 120, "1/k", seed) for seed in range(5)]).to(dtype)
    clean = orthogonalize(batch, method)
    batch[1] = 0.0
    batch[2, 3, 4] = float("nan")
    batch[3, 0, 0] = float("inf")
    out = orthogonalize(batch, method)
    assert not bool(out[1].any())
    assert bool(out[2].isnan().all())
    assert bool(out[3].isnan().all())
    # the norm of a batch with extreme members is taken another way: one rounding of the input's scale
    atol = 1e-4 if dtype != torch.bfloat16 else 8e-3
    torch.testing.assert_close(out[[0, 4]], clean[[0, 4]], rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (4, 1, 7)])
@pytest.mark.parametrize("method", METHODS)
def test_one_row_or_column_is_normalised(shape, method):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for scale in (1e-30, 1.0, 1e30):
        norm = torch.linalg.vector_norm(orthogonalize(x * scale, method), dim=(-2, -1))
        torch.testing.assert_close(norm, torch.ones_like(norm), rtol=1e-5, atol=0)
    assert not bool(orthogonalize(torch.zeros(shape), method).any())


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(shape):
    for method in METHODS:
        assert orthogonalize(torch.zeros(shape), method).shape == shape


@given(shapes, seeds, st.sampled_from(METHODS))
@settings(max_examples=30, deadline=None)
def test_symmetries(shape, seed, method):
    """polar(cX) = polar(X), polar(Xᵀ) = polar(X)ᵀ, polar(PX) = P polar(X); batches equal single calls."""
    x = matrix(*shape, "flat", seed) + 0.1 * matrix(*shape, "gaussian", seed + 1)
    out = orthogonalize(x, method)
    near = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(orthogonalize(3.7 * x, method), out, **near)
    torch.testing.assert_close(orthogonalize(x.mT, method).mT, out, **near)
    rotation = polar(matrix(shape[0], shape[0], "gaussian", seed))
    torch.testing.assert_close(orthogonalize(rotation @ x, method), rotation @ out, **near)
    torch.testing.assert_close(orthogonalize(torch.stack([x, 2 * x]).unsqueeze(0), method)[0, 1], out, **near)


@pytest.mark.parametrize("spectrum", ["1/k", "1/k²", "ill-conditioned", "rank-deficient"])
@pytest.mark.parametrize("steps", [5, 6, 8])
def test_gram_iteration_never_explodes_in_half_precision(spectrum, steps):
    x = matrix(128, 512, spectrum)
    for dtype in (torch.bfloat16, torch.float16):
        out = orthogonalize(x.to(dtype), "gram-newton-schulz", steps, dtype=dtype)
        assert float(torch.linalg.matrix_norm(out.double(), 2)) < 1.25


def test_restarts_are_what_keeps_bfloat16_bounded():
    """The planned restarts matter: without any, rounding is amplified beyond use."""
    x = matrix(128, 512, "1/k²").bfloat16()
    out = orthogonalize(x, "gram-newton-schulz", 5, coefficients="polar-express", restarts=())
    assert not bool(out.isfinite().all()) or float(torch.linalg.matrix_norm(out.double(), 2)) > 2


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("restarts", [(), (2,), (1, 2, 3, 4), (1, 3)])
@pytest.mark.parametrize("shape", [(3, 96, 100), (1, 257, 300), (2, 7, 30)])
def test_both_loops_agree(shape, restarts, tight):
    """The staircase loop in float32 against the batched one in float64, whatever the restarts."""
    triples = resolve_coefficients("fast", 5, "fast")
    x = torch.stack([matrix(*shape[1:], "flat", i) + matrix(*shape[1:], "gaussian", i) / 30 for i in range(shape[0])])
    want = iterate(x, triples, restarts, torch.float64, tight=tight)
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 1e-2)):
        got = iterate_symmetric(x.to(dtype), triples, restarts, tight=tight)
        assert got.dtype == dtype
        assert float((got.double() - want).abs().max()) < tolerance


def test_threads_do_not_change_the_result_and_are_restored():
    before = torch.get_num_threads()
    x = torch.stack([matrix(100, 130, "1/k", i).float() for i in range(5)])
    try:
        torch.set_num_threads(1)
        want = orthogonalize(x)
        torch.set_num_threads(3)
        with torch.inference_mode():
            got = orthogonalize(x.clone())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, want)


def test_an_error_in_a_worker_reaches_the_caller():
    def fail(part):
        if 1 in part:
            raise ValueError("planted")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in range(2):  # the lock must be free again
            with pytest.raises(ValueError, match="planted"):
                share_out(3, fail)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_gradients_flow():
    x = matrix(4, 6).requires_grad_()
    for method in ("auto", "newton-schulz", "gram-newton-schulz"):
        assert torch.autograd.gradcheck(lambda t, m=method: orthogonalize(t, m, 4), (x,))
    assert torch.autograd.gradcheck(polar, (x,))
    large = matrix(120, 130).float().requires_grad_()
    orthogonalize(large).sum().backward()
    assert large.grad is not None
    assert bool(large.grad.isfinite().all())


def test_input_is_not_written_to():
    for dtype in DTYPES:
        for shape in ((3, 100, 120), (2, 120, 100), (5, 6)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            kept = x.clone()
            for method in METHODS:
                orthogonalize(x, method)
            assert torch.equal(x, kept)


@given(shapes, spectra, seeds)
@settings(max_examples=25, deadline=None)
def test_polar_and_nuclear_norm(shape, spectrum, seed):
    x = matrix(*shape, spectrum, seed)
    q = polar(x)
    check_orthonormal(q if shape[0] >= shape[1] else q.mT, 1e-12)
    # <X, polar(X)> = Σσ is what makes the polar factor the nearest frame
    assert float((x * q).sum()) == pytest.approx(float(nuclear_norm(x)), abs=1e-10)
    assert float(nuclear_norm(x)) == pytest.approx(float(torch.linalg.svdvals(x).sum()), abs=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(24, 24), (30, 12), (12, 30)])
def test_jordan_steps_equal_torch(shape):
    from torch.optim._muon import _zeropower_via_newtonschulz

    x = matrix(*shape).float()
    theirs = _zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    ours = orthogonalize(x, "newton-schulz", dtype=torch.bfloat16)
    # two bfloat16 evaluations of one polynomial: rounding of entries up to 1.2, amplified by five steps
    assert float((ours - theirs.float()).abs().max()) < 0.04


@pytest.mark.parametrize("spectrum", ["gaussian", "1/k", "1/k²"])
@pytest.mark.parametrize("shape", [(96, 96), (192, 96), (128, 384)])
def test_quality_clause(shape, spectrum):
    """Never worse than five jordan steps, in every band of singular values that the input has."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    x = matrix(*shape, spectrum)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)

    def gains(out):
        return torch.einsum("mk,mn,kn->k", u, out.double(), vh)

    ours = gains(orthogonalize(x.float(), dtype=torch.bfloat16))
    theirs = gains(_zeropower_via_newtonschulz(x.float(), (3.4445, -4.7750, 2.0315), 5, 1e-7))
    for low, high in ((1e-2, 2.0), (1e-3, 1e-2), (1e-4, 1e-3)):
        band = (s >= low * s.norm()) & (s < high * s.norm())
        if bool(band.any()):
            assert float((ours[band] - 1).square().mean()) <= float((theirs[band] - 1).square().mean())


def test_planted_bug_is_caught(monkeypatch):
    """A wrong sign in one coefficient of one step must not get past the checker."""
    x = matrix(30, 40, "1/k")
    check_polar(x, orthogonalize(x), POLAR_TOLERANCE[torch.float64])
    table = COEFFICIENT_SETS["polar-express"]
    a, b, c = table[2]
    broken = {**COEFFICIENT_SETS, "polar-express": (*table[:2], (a, b * 0.97, c), *table[3:])}
    monkeypatch.setattr(coefficient_module, "COEFFICIENT_SETS", broken)
    with pytest.raises(AssertionError, match="singular value"):
        check_polar(x, orthogonalize(x, steps=5), 0.125)
    # the fully converging iteration forgives a small slip in an early step, not one in the last
    broken["polar-express"] = (*table[:6], (1.9, -1.25, 0.375))
    monkeypatch.setattr(coefficient_module, "NEWTON_SCHULZ_QUINTIC", (1.9, -1.25, 0.375))
    with pytest.raises(AssertionError, match="singular value"):
        check_polar(x, orthogonalize(x), POLAR_TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: orthogonalize(torch.zeros(3)), OptionError, r"\(3,\)"),
        (lambda: orthogonalize(torch.zeros(3, 3, dtype=torch.int64)), OptionError, "int64"),
        (lambda: orthogonalize(torch.eye(3), "newton-shulz"), UnknownNameError, "newton-schulz"),
        (lambda: orthogonalize(torch.eye(3), coefficients="jordn"), UnknownNameError, "jordan"),
        (lambda: orthogonalize(torch.eye(3), steps=0), OptionError, "steps=0"),
        (lambda: orthogonalize(torch.eye(3), "gram-newton-schulz", 5, restarts=(5,)), OptionError, "between 1 and 4"),
        (lambda: polar(torch.full((2, 2), float("nan"))), NonFiniteError, "4 non-finite"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
