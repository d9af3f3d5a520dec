"""Speed and quality of `deltaw.linalg.orthogonalize` beside the five jordan steps inside `torch.optim.Muon`.

    python benchmarks/orthogonalize.py [--quick] [--repeats N] [--momenta FILE.safetensors]

Both run in one process, in turn, stack by stack; a time is the median over repeats. Quality is the RMS of |σ − 1| over
the singular values of the input in a band of σ/‖X‖_F, read along the true singular pairs (uᵢᵀ Out vᵢ, in float64).
Writes benchmarks/results/orthogonalize.json and .md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from momenta import record
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from deltaw.linalg import orthogonalize, random_orthonormal, seeded_generator
from deltaw.linalg._workers import share_out
from deltaw.linalg.newton_schulz import _cost, cheapest_restarts, float32_is_fastest

RESULTS = Path(__file__).parent / "results"
#: model -> {shape: count of matrices a Muon step orthogonalizes}
MODELS = {
    "MiniLM-L6": {(384, 384): 24, (1536, 384): 6, (384, 1536): 6},
    "SmolLM2-135M": {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30},
}
BANDS = {">=1e-2": (1e-2, 2.0), "1e-3..1e-2": (1e-3, 1e-2), "1e-4..1e-3": (1e-4, 1e-3)}
#: matrices of one shape a call of ours takes, as an optimizer's stack does; torch's Muon walks them one by one
STACK = 6
JORDAN = (3.4445, -4.7750, 2.0315)


def torch_muon(x: Tensor) -> Tensor:
    """What torch.optim.Muon applies to one update."""
    return _zeropower_via_newtonschulz(x, JORDAN, 5, 1e-7)


def deltaw_auto(x: Tensor) -> Tensor:
    """What deltaw's Muon applies."""
    return orthogonalize(x, dtype=torch.bfloat16)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_shape(shape: tuple[int, int], repeats: int, seed: int) -> dict[str, float]:
    """Median seconds a matrix, both ways in turn, and the floor: our multiplications at the speed of a plain product."""
    x = torch.randn(STACK, *shape, generator=seeded_generator(seed, "speed", shape))
    s, l = sorted(shape)
    wide, target = x[0].reshape(s, l), torch.empty(STACK, s, s)

    def products(members: range) -> None:
        for i in members:
            torch.mm(wide, wide.mT, out=target[i])

    times: dict[str, list[float]] = {"torch": [], "deltaw": [], "product": [], "pair": []}
    for turn in range(repeats + 3):
        found = {"torch": seconds(lambda: [torch_muon(member) for member in x]) / STACK}
        found["deltaw"] = seconds(lambda: deltaw_auto(x)) / STACK
        found["product"] = seconds(lambda: share_out(STACK, products)) / STACK
        found["pair"] = found["torch"] / found["deltaw"]
        if turn >= 3:
            for key, value in found.items():
                times[key].append(value)
    out = {key: statistics.median(values) for key, values in times.items()}
    cuts = cheapest_restarts(s, l, 5, torch.float32, symmetric=float32_is_fastest())
    multiplications = _cost(s, l, 5, cuts, float32_is_fastest())
    out["floor"] = out["product"] * multiplications / (s * s * l)
    return out


def spectrum(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    """A float64 matrix with Gaussian entries or with singular values k⁻¹, k⁻² between Haar frames."""
    m, n = shape
    generator = seeded_generator(seed, kind, shape)
    if kind == "Gaussian":
        return torch.randn(m, n, generator=generator, dtype=torch.float64)
    q = min(m, n)
    values = torch.arange(1, q + 1, dtype=torch.float64) ** {"1/k": -1.0, "1/k²": -2.0}[kind]
    u = random_orthonormal(m, q, generator, torch.float64)
    return (u * values) @ random_orthonormal(n, q, generator, torch.float64).mT


def deviations(x: Tensor, method: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
    """|uᵢᵀ Out vᵢ − 1| per band, and the largest singular value of the output."""
    out = method(x.float()).double()
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    gains = torch.einsum("mk,mn,kn->k", u, out, vh)
    share = s / s.norm()
    found = {name: (gains - 1).abs()[(share >= low) & (share < high)].tolist() for name, (low, high) in BANDS.items()}
    return found | {"largest": [float(torch.linalg.matrix_norm(out, 2))]}


def quality(sources: dict[str, list[Tensor]]) -> list[dict]:
    rows = []
    for source, matrices in sources.items():
        for label, method in (("torch jordan x5", torch_muon), ("deltaw auto", deltaw_auto)):
            pooled: dict[str, list[float]] = {}
            for x in matrices:
                for key, values in deviations(x, method).items():
                    pooled.setdefault(key, []).extend(values)
            row = {"spectrum": source, "method": label, "matrices": len(matrices)}
            for band in BANDS:
                values = torch.tensor(pooled[band], dtype=torch.float64)
                row[band] = float(values.square().mean().sqrt()) if len(values) else None
                row[f"count {band}"] = len(values)
            rows.append(row | {"largest": max(pooled["largest"])})
    return rows


def machine() -> dict:
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "commit": commit.strip(),
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "float32_is_fastest": float32_is_fastest(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def render(result: dict) -> str:
    speed = [
        [
            r["model"], r["shape"], str(r["count"]), f"{r['torch_ms']:.2f}", f"{r['deltaw_ms']:.2f}", f"{r['ratio']:.2f}",
            f"{r['floor_fraction']:.2f}",
        ]
        for r in result["speed"]
    ]  # fmt: skip
    grade = [
        [
            r["spectrum"], r["method"],
            *("–" if r[b] is None else f"{r[b]:.3f}" for b in BANDS), f"{r['largest']:.3f}",
        ]
        for r in result["quality"]
    ]  # fmt: skip
    about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    return "\n\n".join([
        "# orthogonalize against the five jordan steps of torch.optim.Muon",
        f"Seed {result['seed']}, {result['repeats']} repeats, {about}.",
        "Milliseconds a matrix (median, interleaved); ratio = torch / deltaw (median over pairs); floor = the "
        "multiplications we make, at the speed of a plain float32 product X Xᵀ on the same threads, over our time (staircase products counted at 3/4).",
        table(["model", "shape", "count", "torch", "deltaw", "ratio", "of the floor"], speed),
        "RMS of |σ − 1| per band of σ/‖X‖_F of the input, and the largest output singular value.",
        table(["spectrum", "method", *BANDS, "largest σ"], grade),
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few repeats, one shape for quality, nothing written")
    parser.add_argument("--momenta", type=Path, help="safetensors file of recorded momenta (default: record some)")
    args = parser.parse_args()
    repeats = 5 if args.quick else args.repeats

    shapes = [(384, 384)] if args.quick else [(384, 384), (1536, 384), (192, 576), (576, 576)]
    sources = {kind: [spectrum(kind, shape, args.seed) for shape in shapes] for kind in ("Gaussian", "1/k", "1/k²")}
    if args.momenta:
        from safetensors.torch import load_file

        sources["recorded momenta"] = list(load_file(args.momenta).values())
    elif not args.quick:
        sources["recorded momenta"] = list(record(seed=args.seed).values())
    rows = []
    with torch.no_grad():
        for model, shapes in MODELS.items():
            totals = {"torch": 0.0, "deltaw": 0.0, "floor": 0.0}
            for shape, count in shapes.items():
                t = time_shape(shape, repeats, args.seed)
                for key in totals:
                    totals[key] += count * t[key]
                rows.append(_row(model, "×".join(map(str, shape)), count, t, t["pair"]))
            rows.append(_row(model, "all", sum(shapes.values()), totals, totals["torch"] / totals["deltaw"]))
    with torch.no_grad():
        grades = quality({k: v for k, v in sources.items() if v})
    result = {"seed": args.seed, "repeats": repeats, "machine": machine(), "speed": rows, "quality": grades}
    print(render(result))
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "orthogonalize.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        (RESULTS / "orthogonalize.md").write_text(render(result))


def _row(model: str, shape: str, count: int, t: dict[str, float], ratio: float) -> dict:
    return {
        "model": model,
        "shape": shape,
        "count": count,
        "torch_ms": t["torch"] * 1e3,
        "deltaw_ms": t["deltaw"] * 1e3,
        "ratio": ratio,
        "floor_fraction": t["floor"] / t["deltaw"],
    }


if __name__ == "__main__":
    main()
