"""Spectral merging of single matrices, by deltaw and written with `torch.linalg.svd`: for `merge.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from deltaw.demo import DOMAINS, domain_examples
from deltaw.linalg import random_orthonormal, seeded_generator
from deltaw.merge import merge
from deltaw.models import load_pretrained, load_tokenizer

NAME = "layers.0.up_proj.weight"
TASKS = 4
ROUNDS = 3


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(x, full_matrices=False)


def polar(x: Tensor) -> Tensor:
    u, _, vh = svd(x)
    return u @ vh


def iso_c(changes: list[Tensor]) -> Tensor:
    u, s, vh = svd(sum(changes[1:], changes[0]))
    return s.mean() * (u @ vh)


def tsv_m(changes: list[Tensor]) -> Tensor:
    k = min(changes[0].shape) // len(changes)
    parts = [svd(c) for c in changes]
    left = torch.cat([u[:, :k] for u, _, _ in parts], 1)
    right = torch.cat([vh[:k] for _, _, vh in parts], 0)
    return polar(left) * torch.cat([s[:k] for _, s, _ in parts]) @ polar(right)


def iso_cts(changes: list[Tensor], common: float = 0.8) -> Tensor:
    q, count = min(changes[0].shape), len(changes)
    own = round((q - int(q * common)) / count)
    k = q - own * count
    u, s, vh = svd(sum(changes[1:], changes[0]))
    left, values, right = [u[:, :k]], [s[:k]], [vh[:k]]
    for c in changes:
        x, y, z = svd(c - left[0] @ (left[0].mT @ c))
        left, values, right = [*left, x[:, :own]], [*values, y[:own]], [*right, z[:own]]
    return torch.cat(values).mean() * polar(torch.cat(left, 1)) @ polar(torch.cat(right, 0))


def opcm(changes: list[Tensor], alpha: float = 0.5) -> Tensor:
    """One matrix alone; the norms are those of this matrix."""
    total, norms = changes[0], [changes[0].norm()]
    for delta in changes[1:]:
        norms.append(delta.norm())
        u, s, vh = svd(total)
        p = u.mT @ delta @ vh.mT
        k = int((s.cumsum(0) <= alpha * s.sum()).sum())
        removed = torch.diag_embed(p.diagonal())
        removed[:k, :k] = p[:k, :k]
        total = total + delta - u @ removed @ vh
    return total * (sum(norms[1:], norms[0]) / len(norms) / total.norm())


METHODS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "iso-c": iso_c,
    "tsv-m": tsv_m,
    "iso-cts": iso_cts,
    "opcm": opcm,
}


def decaying(kind: str, shape: tuple[int, int], seed: int) -> list[Tensor]:
    """Changes with singular values k⁻¹ or 10^(−4k/q), or Gaussian entries."""
    m, n = shape
    q, out = min(shape), []
    for task in range(TASKS):
        generator = seeded_generator(seed, kind, shape, task)
        if kind == "Gaussian":
            out.append(torch.randn(m, n, generator=generator))
            continue
        index = torch.arange(q, dtype=torch.float64)
        values = 1 / (1 + index) if kind == "1/k" else 10 ** (-4 * index / q)
        u, v = (random_orthonormal(d, q, generator, torch.float64) for d in shape)
        out.append(((u * values) @ v.mT).float())
    return out


def tuned_changes(seed: int, steps: int = 12) -> dict[str, list[Tensor]]:
    """W_t − W_0 of some matrices of all-MiniLM-L6-v2 after a few steps of AdamW on each domain's sentiment."""
    tokenizer = load_tokenizer("all-minilm-l6-v2")
    found: dict[str, list[Tensor]] = {}
    for domain in list(DOMAINS)[:TASKS]:
        torch.manual_seed(seed)
        model = load_pretrained("all-minilm-l6-v2", "classification", num_labels=2, seed=seed)
        names = [f"bert.encoder.layer.3.{n}.weight" for n in ("attention.self.query", "intermediate.dense")]
        before = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
        examples = domain_examples(domain)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for step in range(steps):
            batch = [examples[i] for i in order[16 * step : 16 * (step + 1)]]
            texts = [e["text"] for e in batch]
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
            loss = model(**inputs, labels=torch.tensor([e["label"] for e in batch])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for n, p in model.named_parameters():
            if n in before:
                found.setdefault(n, []).append(p.detach() - before[n])
    return found


def spectral_rows(seed: int) -> list[dict]:
    cases: dict[tuple[str, tuple[int, int]], list[Tensor]] = {}
    for changes in tuned_changes(seed).values():
        m, n = changes[0].shape
        cases["fine-tuned", (m, n)] = changes
    for kind, shape in (
        ("Gaussian", (576, 576)),
        ("4 decades", (576, 576)),
        ("1/k", (1536, 576)),
        ("4 decades", (1024, 1024)),
    ):
        cases[kind, shape] = decaying(kind, shape, seed)
    rows = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for (kind, shape), changes in cases.items():
            for method, reference in METHODS.items():
                rows.append(one(method, reference, kind, shape, changes))
                print(method, kind, shape, f"{rows[-1]['ratio']:.2f} {rows[-1]['error']:.1e}", flush=True)
    torch.set_num_threads(before)
    return rows


def one(
    method: str, reference: Callable[[list[Tensor]], Tensor], kind: str, shape: tuple[int, int], changes: list[Tensor]
) -> dict:
    base, models = {NAME: torch.zeros(shape)}, [{NAME: c} for c in changes]
    options = {"scale": 1.0} if method == "opcm" else {"scale": 1.0, **({} if method == "tsv-m" else {"mean": "all"})}

    def ours() -> Tensor:
        return merge(base, models, method, threads=1, progress=False, **options)[NAME]

    doubles = [c.double() for c in changes]
    exact = reference(doubles)
    sides = {"svd": lambda: reference(changes), "svd64": lambda: reference(doubles), "deltaw": ours}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS + 1):
        for side, run in sides.items():
            clock = time.process_time if side == "deltaw" else time.thread_time
            begin = clock()
            run()
            times[side].append(clock() - begin)
    taken = {side: found[1:] for side, found in times.items()}
    ratios = {side: [a / b for a, b in zip(taken[side], taken["deltaw"], strict=True)] for side in ("svd", "svd64")}
    return {
        "method": method,
        "shape": "×".join(map(str, shape)),
        "changes": kind,
        **{f"{side}_ms": statistics.median(found) * 1e3 for side, found in taken.items()},
        "ratio": statistics.median(ratios["svd"]),
        "ratio64": statistics.median(ratios["svd64"]),
        "svd_error": float((reference(changes).double() - exact).norm() / exact.norm()),
        "error": float((ours().double() - exact).norm() / exact.norm()),
    }
