"""Speed of a whole optimizer step beside `torch.optim.Muon`, and the quality of what it steps along.

    python benchmarks/optim_step.py [--quick] [--rounds N] [--layers N]

The matrices of all-MiniLM-L6-v2 and SmolLM2-135M with Gaussian gradients; every optimizer steps once a round, in
turn and in one process, and the ratio is the median over the rounds. The floor is the multiplications that our
orthogonalization makes, at the speed of a plain product of that shape, with everything else free. Quality: RMS of
|σ − 1| of the orthogonalized matrix over σ >= 1e-2 of the Frobenius norm (see orthogonalize.py), on Gaussian
matrices, spectra 1/k and 1/k², and recorded momenta. Writes benchmarks/results/optim_step.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from momenta import record
from orthogonalize import BANDS, MODELS, RESULTS, machine, quality, spectrum, table, time_shape

from deltaw.optim import Muon, NorMuon

LAYERS = {"MiniLM-L6": 6, "SmolLM2-135M": 30}


def build(model: str, layers: int, make: Callable[[list[torch.nn.Parameter]], Any]) -> Any:
    """An optimizer over the matrices of `layers` layers, gradients in place."""
    g = torch.Generator().manual_seed(0)
    params = []
    for shape, count in MODELS[model].items():
        for _ in range(count * layers // LAYERS[model]):
            p = torch.nn.Parameter(torch.randn(shape, generator=g) * 0.02)
            p.grad = torch.randn(shape, generator=g) * 1e-3
            params.append(p)
    return make(params)


def time_steps(model: str, layers: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Median milliseconds a step, and the median over the rounds of torch's time over ours."""
    makers = {
        "torch.optim.Muon": lambda p: torch.optim.Muon(p, lr=0.02),
        "muon": lambda p: Muon(p, lr=0.02),
        "normuon": lambda p: NorMuon(p, lr=0.02),
    }
    optimizers = {name: build(model, layers, make) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(rounds + 2):
        order = list(optimizers)
        for name in order[turn % 3 :] + order[: turn % 3]:
            start = time.perf_counter()
            optimizers[name].step()
            elapsed = time.perf_counter() - start
            if turn >= 2:  # allocations and kernel choice
                times[name].append(elapsed)
    floor = sum(
        time_shape(shape, max(rounds, 5), seed)["floor"] * (count * layers // LAYERS[model])
        for shape, count in MODELS[model].items()
    )
    base = times["torch.optim.Muon"]
    return [
        {
            "model": model,
            "layers": layers,
            "optimizer": name,
            "ms": statistics.median(found) * 1e3,
            "ratio": statistics.median(b / t for b, t in zip(base, found, strict=True)),
            "lowest_ratio": min(b / t for b, t in zip(base, found, strict=True)),
            "floor_fraction": None if name.startswith("torch") else floor / statistics.median(found),
        }
        for name, found in times.items()
    ]


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown page."""
    speed = [
        [r["model"], str(r["layers"]), r["optimizer"], f"{r['ms']:.1f}", f"{r['ratio']:.2f}", f"{r['lowest_ratio']:.2f}",
         "–" if r["floor_fraction"] is None else f"{r['floor_fraction']:.2f}"]
        for r in result["speed"]
    ]  # fmt: skip
    band = next(iter(BANDS))
    grade = [[r["spectrum"], r["method"], f"{r[band]:.3f}", f"{r['largest']:.3f}"] for r in result["quality"]]
    about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    pages = [
        "# A step of muon and normuon beside torch.optim.Muon",
        f"Seed {result['seed']}, {result['rounds']} rounds, {about}.",
        "Milliseconds a step (median, interleaved); ratio = torch.optim.Muon / ours (median, and the lowest round); "
        "floor = the multiplications we make at the speed of plain products, over our time.",
        table(["model", "layers", "optimizer", "ms", "ratio", "lowest", "of the floor"], speed),
        "RMS of |σ − 1| over σ >= 1e-2 of the Frobenius norm, and the largest output singular value.",
        table(["spectrum", "method", "RMS", "largest σ"], grade),
    ]
    return "\n\n".join(pages) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, help="layers of each model (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few rounds and layers, nothing written")
    args = parser.parse_args()
    rounds = 5 if args.quick else args.rounds
    load = round(os.getloadavg()[0], 1)  # above zero, others were using the machine: trust ratios, not times

    speed = []
    with torch.no_grad():
        for model, every in LAYERS.items():
            layers = args.layers or (min(every, 6) if args.quick else every)
            speed += time_steps(model, layers, rounds, args.seed)
    shapes = [(384, 384)] if args.quick else [(384, 384), (1536, 384), (192, 576), (576, 576)]
    sources = {kind: [spectrum(kind, shape, args.seed) for shape in shapes] for kind in ("Gaussian", "1/k", "1/k²")}
    if not args.quick:
        sources["recorded momenta"] = list(record(seed=args.seed).values())
    with torch.no_grad():
        grades = quality({kind: found for kind, found in sources.items() if found})
    result = {
        "seed": args.seed,
        "rounds": rounds,
        "machine": machine() | {"load": load},
        "speed": speed,
        "quality": grades,
    }
    print(render(result))
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "optim_step.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        (RESULTS / "optim_step.md").write_text(render(result))


if __name__ == "__main__":
    main()
