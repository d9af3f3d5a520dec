"""The loop behind `orthogonalize`: a chain of quintics, evaluated on X or on its smaller Gram matrix.

A quintic step is X ← (aI + bR + cR²)X with R = XXᵀ. Several steps can share one look at X: while Q with
X_now = QX and R are both polynomials of the first R, all products are s×s (Gram Newton–Schulz; Zhang, Amsel, Chen,
Dao, 2026). X is formed anew at the *restarts*; a restart before every step is the plain iteration, so one loop
serves both. Input is [B, s, l] with s <= l.

Two versions: `iterate` is batched, differentiable and runs anywhere. `iterate_symmetric` walks through the batch on the
CPU in float32, in preallocated buffers that stay in cache, and computes only a staircase of each symmetric product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.errors import OptionError
from deltaw.linalg._checks import working_dtype
from deltaw.linalg._symmetric import STRIP_SIDE, Symmetric
from deltaw.linalg._workers import share_out
from deltaw.linalg.coefficients import Triple

_HALF = (torch.bfloat16, torch.float16)
#: a batch of matrices at least this large is walked through rather than batched
_LOOP_SIDE = 96


def unit_scale(x: Tensor) -> Tensor:
    """1/‖X‖_F per matrix, [..., 1, 1], safe for tiny and huge entries.

    A zero matrix gets 1 (it stays zero); one with NaN or infinity gets NaN, so that all of it becomes NaN. `x` must
    be float32 or float64.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    tiny, huge = (1e-16, 1e16) if x.dtype == torch.float32 else (1e-120, 1e120)
    safe = (norm > tiny) & (norm < huge)
    if x.device.type == "cpu" and bool(safe.all()):  # the common case: one pass over the data
        return norm.reciprocal()
    # squares under- or overflowed somewhere: divide by the largest entry first
    peak = x.abs().amax(dim=(-2, -1), keepdim=True)
    divisor = torch.where(peak > 0, peak, 1.0)
    norm = torch.linalg.vector_norm(x / divisor, dim=(-2, -1), keepdim=True)
    norm = torch.where(peak > 0, norm, 1.0)
    scale = (1.0 / norm) / divisor
    return torch.where(torch.isfinite(peak), scale, float("nan"))


def iterate(
    x: Tensor, coefficients: Sequence[Triple], restarts: Sequence[int], dtype: torch.dtype, *, tight: bool = False
) -> Tensor:
    """The chain of quintics on X / ‖X‖_F, batched, in `dtype`; the norm is taken in float32 or wider before the cast.

    Args:
        x: [B, s, l], s <= l.
        coefficients: (a, b, c) a step.
        restarts: steps, from 1, before which X is formed anew.
        dtype: of all products.
        tight: divide further by ‖(XXᵀ)²‖_F^{1/4} = (Σσ⁸)^{1/8}, an upper bound of σ₁ that costs nothing because the
            first step forms R² anyway. It lifts every singular value, so a fixed chain is never worse for it; on a
            Gaussian 384×384 matrix it is 0.15 of the Frobenius norm.
    """
    cuts = check_restarts(restarts, len(coefficients))
    wide = x.to(working_dtype(x.dtype))
    x = (wide * unit_scale(wide)).to(dtype)
    for begin, end in zip([0, *cuts], [*cuts, len(coefficients)], strict=True):
        r = x @ x.mT
        if begin == 0 and tight:
            bound = torch.linalg.vector_norm((r @ r).to(working_dtype(dtype)), dim=(-2, -1), keepdim=True) ** 0.25
            # a zero matrix has bound 0; half precision rounds r by up to 2⁻⁸
            shrink = 1.0 / (torch.where(bound > 0, bound, 1.0) * (1.01 if dtype in _HALF else 1.0001))
            x, r = (x * shrink).to(dtype), (r * shrink.square()).to(dtype)
        q: Tensor | None = None
        first = coefficients[begin][0]
        for step in range(begin, end):
            a, b, c = coefficients[step]
            z = torch.baddbmm(r, r, r, beta=b, alpha=c)
            # Q starts as I, so after the first step it is Z + aI; that aI joins when a second step needs it
            if q is None:
                q = z
            else:
                if step == begin + 1:
                    q = q + first * torch.eye(q.shape[-1], dtype=dtype, device=q.device)
                q = torch.baddbmm(q, q, z, beta=a)
            if step < end - 1:
                rz = torch.baddbmm(r, r, z, beta=a)
                r = torch.baddbmm(rz, rz, z, beta=a)
        assert q is not None
        x = torch.baddbmm(x, q, x, beta=first) if end - begin == 1 else q @ x
    return x


def iterate_symmetric(
    x: Tensor, coefficients: Sequence[Triple], restarts: Sequence[int], *, tight: bool = False
) -> Tensor:
    """As `iterate`, in float32 on the CPU without gradient, one matrix after the other; [B, s, l] in the dtype of `x`."""
    cuts = check_restarts(restarts, len(coefficients))
    batch, s, l = x.shape
    out = torch.empty_like(x)

    def walk(members: range) -> None:
        work = tuple(map(Symmetric, torch.empty(4, s, s, dtype=torch.float32)))
        spare = torch.empty(min(len(cuts), 2), s, l, dtype=torch.float32)
        for member in members:
            _one(x[member].float(), out[member], coefficients, cuts, tight, work, spare)

    with torch.no_grad():
        share_out(batch, walk)
    return out


def _one(
    x: Tensor,
    out: Tensor,
    coefficients: Sequence[Triple],
    cuts: Sequence[int],
    tight: bool,
    work: tuple[Symmetric, ...],
    spare: Tensor,
) -> None:
    """One matrix of `iterate_symmetric`: reads `x`, writes `out`, scratches `work` (four) and `spare` [0 … 2, s, l]."""
    r, r2, z, t = work
    r.set(x, x.mT)
    energy = float(r.x.diagonal().sum())  # ‖X‖_F²: no pass over X, and the scale is applied to the s×s side
    if not 1e-24 < energy < 1e24:
        scale = unit_scale(x)
        if not bool(torch.isfinite(scale)) or (energy == 0.0 and not bool(x.any())):
            out.fill_(0.0 if bool(torch.isfinite(scale)) else float("nan"))
            return
        x = x * scale
        r.set(x, x.mT)
        energy = float(r.x.diagonal().sum())
    r.x.mul_(1.0 / energy)
    scale = energy**-0.5
    for begin, end in zip([0, *cuts], [*cuts, len(coefficients)], strict=True):
        if begin:
            r.set(x, x.mT)
        q: Symmetric | None = None
        for step in range(begin, end):
            if step == 0 and tight:
                a, b, c = coefficients[step]
                r2.product(r, r)
                bound = float(torch.linalg.vector_norm(r2.x)) ** 0.25 * 1.0001
                r.x.mul_(bound**-2)
                torch.mul(r.x, b, out=z.x).add_(r2.x, alpha=c * bound**-4).diagonal().add_(a)
                scale /= bound
            else:
                z.quadratic(r, *coefficients[step])
            if step < end - 1:
                r2.product(r, z)  # RZ
                r.product(r2, z)
            if q is None:
                q, z = z, t  # the buffers trade places: Q keeps what was Z
            else:
                r2.product(q, z)
                q, t, r2 = r2, z, q
                z = t
        assert q is not None
        if begin == 0:
            q.x.mul_(scale)
        if end == len(coefficients) and out.dtype == torch.float32:
            torch.mm(q.x, x, out=out)
        elif end == len(coefficients):
            out.copy_(q.x @ x)
        else:
            target = spare[cuts.index(end) % 2]
            torch.mm(q.x, x, out=target)
            x = target
        r, r2, z, t = work


def check_restarts(restarts: Sequence[int], steps: int) -> list[int]:
    """Sorted restarts without repetition; `OptionError` unless each is a step from 1 to steps − 1."""
    cuts = sorted(set(restarts))
    if cuts and not (cuts[0] > 0 and cuts[-1] < steps):
        raise OptionError(f"restarts={list(restarts)}; expected steps between 1 and {steps - 1}")
    return cuts


def gram_restarts(steps: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Where the Gram iteration forms X anew: before step 2 and then every second step, every third in float64.

    Rounding leaves R slightly indefinite, and the steep early steps amplify a wrong eigenvalue at every step until the
    next restart. Measured on decaying and rank-deficient spectra: bf16 explodes with three steps in a row; float32
    survives five, but with errors up to 0.5, 1e-3 when the restart comes before step 3 and 1e-4 before step 2.
    """
    if dtype in _HALF:
        return tuple(range(2, steps, 2))
    return tuple(range(2, steps, 3))


def cheapest_restarts(s: int, l: int, steps: int, dtype: torch.dtype, *, symmetric: bool) -> tuple[int, ...]:
    """Restarts before every step (the plain iteration) or those of `gram_restarts`, whichever multiplies less."""
    gram = gram_restarts(steps, dtype)
    plain = tuple(range(1, steps))
    return gram if _cost(s, l, steps, gram, symmetric) < 0.97 * _cost(s, l, steps, plain, symmetric) else plain


def _cost(s: int, l: int, steps: int, cuts: Sequence[int], symmetric: bool) -> float:
    """Multiplications, counting a symmetric product as what `Symmetric` makes of it."""
    share = 0.75 if symmetric and s >= STRIP_SIDE else 1.0
    total = 0.0
    for begin, end in zip([0, *cuts], [*cuts, steps], strict=True):
        # R² every step, Q from the second on, RZ and the next R but for the last
        squares = (end - begin) + 3 * (end - begin - 1)
        total += share * (s * s * l + squares * s**3) + s * s * l
    return total


def float32_is_fastest() -> bool:
    """Whether float32 products outrun bfloat16 ones on this CPU.

    Without a matrix unit (AMX) they do on current Intel cores, where AVX512-BF16 runs at half the float32 rate, and
    emulated bfloat16 is slower still. Decided by capability, not by timing, so that results repeat.
    """
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return not (probe is not None and probe())


def loops_in_cache(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `iterate_symmetric` may and should take [B, s, l]: CPU, float32, no gradient, matrices not tiny."""
    if x.device.type != "cpu" or dtype != torch.float32 or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return x.shape[-2] >= _LOOP_SIDE or x.shape[0] == 1
