"""Speed and memory of every optimizer's step beside the best installable peer of the same method.

    python benchmarks/optim.py [--quick] [--memory] [--rounds N] [--layers N] [--methods a,b] [--dtype bfloat16]

The matrices of all-MiniLM-L6-v2 and SmolLM2-135M with Gaussian gradients. A bout is one method and its peers, or
several without a peer and a reference; in a bout every optimizer steps once a round, in turn and in one process, and
a ratio is the median over the rounds. The floor is the multiplications that our orthogonalization makes, at the speed
of a plain product of that shape, with everything else free. Memory is what a fresh process holds of its own pages
(RssAnon) at the highest point of four steps, over what weights and gradients took, the median of three processes.
Quality: RMS of |σ − 1| of the orthogonalized matrix over σ >= 1e-2 of the Frobenius norm (see orthogonalize.py), on
Gaussian matrices, spectra 1/k and 1/k², and recorded momenta. Writes benchmarks/results/optim.json and .md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from momenta import record
from orthogonalize import BANDS, MODELS, RESULTS, machine, quality, spectrum, table, time_shape

from deltaw import catalogue
from deltaw.memory import return_freed_memory

LAYERS = {"MiniLM-L6": 6, "SmolLM2-135M": 30}
#: distributions whose versions the page names
PEERS = ("torch", "pytorch_optimizer", "heavyball", "lion-pytorch", "transformers")
Params = list[torch.nn.Parameter]
Make = Callable[[Params], Any]


@dataclass(frozen=True)
class Bout:
    """Optimizers of ours that step in turn with peers: name -> (id, options), and name -> how to build it.

    `refresh` marks a bout that times the step in which subspaces are renewed: few rounds, on the smaller model.
    `reference` says that the peers are no peers of the same method.
    """

    ours: dict[str, tuple[str, dict[str, Any]]]
    peers: dict[str, Make]
    refresh: bool = False
    reference: bool = False


def _po(name: str, grouped: dict[str, Any] | None = None, **options: Any) -> Make:
    """An optimizer of pytorch_optimizer; `grouped` are options it reads from the group only."""

    def make(params: Params) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)([{"params": params, **(grouped or {})}], **options)

    return make


def _heavyball(name: str, **options: Any) -> Make:
    def make(params: Params) -> Any:
        import heavyball

        heavyball.utils.compile_mode = None  # what CPUs without a compiler run; compiling takes minutes
        return getattr(heavyball, name)(params, **options)

    return make


def _lion_pytorch(params: Params) -> Any:
    import lion_pytorch

    return lion_pytorch.Lion(params)


def _transformers_adafactor(params: Params) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=1e-3, scale_parameter=True, relative_step=False)


def _lookahead(params: Params) -> Any:
    import pytorch_optimizer

    return pytorch_optimizer.Lookahead(torch.optim.AdamW(params, lr=1e-3, foreach=True), k=5, alpha=0.5)


def _torch(name: str, **options: Any) -> Make:
    return lambda params: getattr(torch.optim, name)(params, **options)


def _galore(every: int) -> Make:
    grouped = {"rank": 128, "update_proj_gap": every, "scale": 0.25, "projection_type": "std"}
    return _po("GaLore", grouped, lr=0.01)


def _both(id: str, **options: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """As it is, and without the look at the gradients that no peer takes: beside one pass over memory it shows."""
    return {id: (id, options), f"{id}, unchecked": (id, {**options, "nonfinite": "ignore"})}


def _own(*ids: str, **options: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    return {id: (id, options) for id in ids}


_MUON = {"use_muon": True}
#: by their name on the command line
BOUTS = {
    "muon": Bout(
        _own("muon", lr=0.02),
        {
            "torch.optim.Muon": _torch("Muon", lr=0.02),
            "pytorch_optimizer.Muon": _po("Muon", _MUON, lr=0.02),
            "pytorch_optimizer.Muon gram": _po("Muon", _MUON, lr=0.02, ns_method="gram_newton_schulz"),
            "heavyball.Muon": _heavyball("Muon", lr=0.02),
        },
    ),
    "normuon": Bout(
        _own("normuon", lr=0.02),
        {
            "pytorch_optimizer.NorMuon": _po("NorMuon", _MUON, lr=0.02),
            "torch.optim.Muon (reference)": _torch("Muon", lr=0.02),
        },
    ),
    "adamuon": Bout(
        _own("adamuon", lr=6e-4),
        {
            "pytorch_optimizer.AdaMuon": _po("AdaMuon", _MUON, lr=6e-4),
            "torch.optim.Muon (reference)": _torch("Muon", lr=0.02),
        },
    ),
    "norm-lmo": Bout(
        _own("norm-lmo", ball="rms-operator"),
        {
            "pytorch_optimizer.SCION": _po("SCION", norm_type=2, lr=0.02),
            "heavyball.Scion": _heavyball("Scion", lr=0.02),
            "torch.optim.Muon (reference)": _torch("Muon", lr=0.02),
        },
    ),
    "adamw": Bout(
        _both("adamw"),
        {
            "torch.optim.AdamW fused": _torch("AdamW", lr=1e-3, fused=True),
            "torch.optim.AdamW foreach": _torch("AdamW", lr=1e-3, foreach=True),
        },
    ),
    "sgd": Bout(
        _both("sgd", momentum=0.9),
        {
            "torch.optim.SGD fused": _torch("SGD", lr=0.1, momentum=0.9, fused=True),
            "torch.optim.SGD foreach": _torch("SGD", lr=0.1, momentum=0.9, foreach=True),
        },
    ),
    "lion": Bout(
        _both("lion", weight_decay=0.0),
        {"pytorch_optimizer.Lion": _po("Lion", foreach=True), "lion_pytorch.Lion": _lion_pytorch},
    ),
    "adan": Bout(
        _both("adan"),
        {"pytorch_optimizer.Adan": _po("Adan"), "pytorch_optimizer.Adan foreach": _po("Adan", foreach=True)},
    ),
    "amsgrad": Bout(
        _both("amsgrad", bias_correction=True),
        {
            "torch.optim.AdamW amsgrad fused": _torch("AdamW", lr=1e-3, amsgrad=True, fused=True),
            "torch.optim.AdamW amsgrad foreach": _torch("AdamW", lr=1e-3, amsgrad=True, foreach=True),
        },
    ),
    "lookahead": Bout(_own("lookahead"), {"pytorch_optimizer.Lookahead of torch.optim.AdamW": _lookahead}),
    "adafactor": Bout(
        _both("adafactor", relative_step=False, lr=1e-3),
        {
            "torch.optim.Adafactor": _torch("Adafactor", lr=1e-3, foreach=True),
            "pytorch_optimizer.AdaFactor": _po("AdaFactor", lr=1e-3, relative_step=False),
            "transformers.Adafactor": _transformers_adafactor,
        },
    ),
    "conda": Bout(_own("conda"), {"pytorch_optimizer.Conda": _po("Conda", lr=6e-3, scale=0.25, betas=(0.9, 0.99))}),
    "conda, renewing": Bout(
        {"conda, renewing": ("conda", {"refresh_every": 1})},
        {"pytorch_optimizer.Conda": _po("Conda", lr=6e-3, scale=0.25, betas=(0.9, 0.99), update_proj_gap=1)},
        refresh=True,
    ),
    "galore": Bout(_both("galore"), {"pytorch_optimizer.GaLore": _galore(200)}),
    "galore, renewing": Bout(
        {"galore, renewing": ("galore", {"refresh_every": 1})},
        {"pytorch_optimizer.GaLore": _galore(1)},
        refresh=True,
    ),
    "orthogonalized without a peer": Bout(
        _own("dion", "dion2", "nordion2", "trion", "auon", "hybrid-auon"),
        {"torch.optim.Muon (reference)": _torch("Muon", lr=0.02)},
        reference=True,
    ),
    "others without a peer": Bout(
        _own("dct-adamw", "q-galore", "online-subspace-descent", "exp-sgdm", "coord-clip"),
        {"torch.optim.AdamW foreach (reference)": _torch("AdamW", lr=1e-3, foreach=True)},
        reference=True,
    ),
}
#: those whose step is one orthogonalization of every matrix and passes over memory
FLOORED = ("muon", "normuon", "adamuon", "norm-lmo")


def parameters(model: str, layers: int, dtype: torch.dtype) -> Params:
    """The matrices of `layers` layers, gradients in place."""
    g = torch.Generator().manual_seed(0)
    params = []
    for shape, count in MODELS[model].items():
        for _ in range(count * layers // LAYERS[model]):
            p = torch.nn.Parameter((torch.randn(shape, generator=g) * 0.02).to(dtype))
            p.grad = (torch.randn(shape, generator=g) * 1e-3).to(dtype)
            params.append(p)
    return params


def build(bout: Bout, name: str, params: Params) -> Any:
    """An optimizer of a bout by its name, ours or a peer's."""
    if name in bout.peers:
        return bout.peers[name](params)
    id, options = bout.ours[name]
    return catalogue.get(id, "optim").target(params, **options)


@dataclass
class Times:
    """Seconds of every round by optimizer, and what could not be run and why."""

    found: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def time_bout(bout: Bout, model: str, layers: int, rounds: int, dtype: torch.dtype) -> Times:
    """Everything in the bout, a step a round and in turn; two rounds before the count (one of a refresh)."""
    times = Times()
    optimizers = {}
    held: dict[str, Params] = {}
    gradients = {}
    for name in (*bout.ours, *bout.peers):
        try:
            held[name] = parameters(model, layers, dtype)
            gradients[name] = [p.grad for p in held[name]]
            optimizers[name] = build(bout, name, held[name])
            optimizers[name].step()  # a peer may refuse here only
        except Exception as error:  # a peer that is missing or cannot do this: the page says so
            if name in bout.ours:
                raise
            optimizers.pop(name, None)
            times.skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    times.found = {name: [] for name in optimizers}
    order = list(optimizers)
    early = 0 if bout.refresh else 1
    for turn in range(rounds + early):
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            for p, gradient in zip(held[name], gradients[name], strict=True):
                p.grad = gradient  # some peers drop or change it
            start = time.perf_counter()
            optimizers[name].step()
            elapsed = time.perf_counter() - start
            if turn >= early:  # allocations and kernel choice
                times.found[name].append(elapsed)
    return times


def rows_of(bout: Bout, times: Times, model: str, layers: int, floor: float) -> list[dict[str, Any]]:
    """A row for each of ours against each peer; the best peer of the same method is marked."""
    rows = []
    same = [p for p in bout.peers if p in times.found and not p.endswith("(reference)")]
    best = min(same, key=lambda p: statistics.median(times.found[p]), default=None)
    for name in bout.ours:
        ours = times.found[name]
        shared = {"model": model, "layers": layers, "method": name, "ms": statistics.median(ours) * 1e3}
        shared["floor_fraction"] = floor / statistics.median(ours) if name in FLOORED else None
        for peer in (p for p in bout.peers if p in times.found):
            ratios = [b / a for a, b in zip(ours, times.found[peer], strict=True)]
            rows.append(
                shared
                | {"peer": peer, "peer_ms": statistics.median(times.found[peer]) * 1e3, "best": peer == best}
                | {"ratio": statistics.median(ratios), "lowest_ratio": min(ratios)}
            )
    return rows


# -- memory ----------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of anonymous pages of this process; 0 where /proc does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found.group(1)) * 1024 if found else 0


def probe(bout: Bout, name: str, model: str, layers: int, dtype: torch.dtype, steps: int = 4) -> int:
    """The most bytes beyond weights and gradients that building and stepping held, sampled every millisecond."""
    build(bout, name, [torch.nn.Parameter(torch.zeros(4, 4, dtype=dtype))])  # imports
    torch.randn(256, 256) @ torch.randn(256, 256)  # the workspace of the products
    params = parameters(model, layers, dtype)
    return_freed_memory()  # else what making the gradients left behind counts for nothing when it is taken again
    before = highest = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(1e-3):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    optimizer = build(bout, name, params)
    gradients = [p.grad for p in params]
    for _ in range(steps):
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        highest = max(highest, resident())
    done.set()
    watcher.join()
    return highest - before


def measure_memory(key: str, name: str, model: str, layers: int, dtype: str) -> int | None:
    """The median of `probe` in three processes, as what an allocator keeps varies; None where it failed."""
    command = [sys.executable, __file__, "--probe", key, name, model, str(layers), "--dtype", dtype]
    found = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(3)]
    values = [int(run.stdout.split()[-1]) for run in found if run.returncode == 0 and run.stdout]
    return statistics.median_low(values) if values else None


def memory_rows(rows: list[dict[str, Any]], keys: dict[str, str], model: str, layers: int, dtype: str) -> None:
    """Peak memory of every method and its best peer (or its first reference), put into their rows."""
    for row in rows:
        first = next(r for r in rows if (r["model"], r["method"]) == (row["model"], row["method"]))
        marked = any(r["best"] for r in rows if (r["model"], r["method"]) == (row["model"], row["method"]))
        if row["model"] != model or not (row["best"] or (not marked and row is first)):
            continue
        key = keys[row["method"]]
        row["bytes"] = measure_memory(key, row["method"], model, layers, dtype)
        row["peer_bytes"] = measure_memory(key, row["peer"], model, layers, dtype)


# -- the page --------------------------------------------------------------------------------------------------------


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown page."""

    def megabytes(value: int | None) -> str:
        return "–" if value is None else f"{value / 2**20:.0f}"

    speed = [
        [r["model"], str(r["layers"]), r["method"], f"{r['ms']:.1f}", f"**{r['peer']}**" if r["best"] else r["peer"],
         f"{r['peer_ms']:.1f}", f"{r['ratio']:.2f}", f"{r['lowest_ratio']:.2f}",
         "–" if r["floor_fraction"] is None else f"{r['floor_fraction']:.2f}"]
        for r in result["speed"]
    ]  # fmt: skip
    memory = [
        [r["model"], str(r["layers"]), r["method"], megabytes(r["bytes"]), r["peer"], megabytes(r["peer_bytes"])]
        for r in result["speed"]
        if r.get("bytes") is not None
    ]
    band = next(iter(BANDS))
    grade = [[r["spectrum"], r["method"], f"{r[band]:.3f}", f"{r['largest']:.3f}"] for r in result["quality"]]
    about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    pages = [
        "# A step of every optimizer beside its peers",
        f"Seed {result['seed']}, {result['rounds']} rounds, {result['dtype']}, {about}; {versions}.",
        "Milliseconds a step (median, interleaved in one process); ratio = peer / ours (median over the rounds, and "
        "the lowest round), above 1 where ours is faster; in bold the fastest peer of the same method, (reference) "
        "another method where there is no peer or for scale; floor = the multiplications we make at the speed of "
        "plain products, over our time. *Renewing* steps compute their subspaces anew. Ours read all gradients once "
        "before the step, for NaN and infinity, so that a bad step changes nothing; no peer does. The rows marked "
        "*unchecked* leave that out (nonfinite='ignore'): like for like, these are the ones to compare.",
        table(["model", "layers", "method", "ms", "peer", "its ms", "ratio", "lowest", "of the floor"], speed),
    ]
    if memory:
        pages += [
            "Peak memory in MiB beyond weights and gradients over four steps, each in a process of its own:",
            table(["model", "layers", "method", "MiB", "peer", "its MiB"], memory),
        ]
    if result["skipped"]:
        pages += ["Not run: " + "; ".join(f"{name}: {why}" for name, why in result["skipped"].items()) + "."]
    pages += [
        "RMS of |σ − 1| over σ >= 1e-2 of the Frobenius norm, and the largest output singular value.",
        table(["spectrum", "method", "RMS", "largest σ"], grade),
    ]
    return "\n\n".join(pages) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, help="layers of each model (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--methods", help="comma-separated ids; nothing written (default: all)")
    parser.add_argument("--quick", action="store_true", help="few rounds, one layer, no memory, nothing written")
    parser.add_argument("--memory", action="store_true", help="memory alone, anew; times stay as recorded")
    parser.add_argument("--probe", nargs=4, metavar=("BOUT", "NAME", "MODEL", "LAYERS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.probe:
        key, name, model, layers = args.probe
        with torch.no_grad():
            print(probe(BOUTS[key], name, model, int(layers), dtype))
        return
    if args.memory:
        result = json.loads((RESULTS / "optim.json").read_text(encoding="utf-8"))
        rows = [r for r in result["speed"] if r["model"] == "SmolLM2-135M"]
        keys = {name: key for key, bout in BOUTS.items() for name in bout.ours}
        memory_rows(rows, keys, "SmolLM2-135M", rows[0]["layers"], result["dtype"])
        write(result)
        return
    rounds = 3 if args.quick else args.rounds
    load = round(os.getloadavg()[0], 1)  # above zero, others were using the machine: trust ratios, not times
    wanted = None if args.methods is None else set(args.methods.split(","))
    chosen = {key: b for key, b in BOUTS.items() if wanted is None or wanted & {id for id, _ in b.ours.values()}}
    if wanted and (unknown := wanted - {id for b in BOUTS.values() for id, _ in b.ours.values()}):
        parser.error(f"no such method here: {', '.join(sorted(unknown))}")

    speed: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for model, every in LAYERS.items():
        layers = 1 if args.quick else args.layers or every
        with torch.no_grad():
            floor = sum(
                time_shape(shape, max(rounds, 5), args.seed)["floor"] * (count * layers // every)
                for shape, count in MODELS[model].items()
            )
        found: list[dict[str, Any]] = []
        for bout in chosen.values():
            if bout.refresh and model != "MiniLM-L6":
                continue
            times = time_bout(bout, model, layers, 2 if bout.refresh else rounds, dtype)
            skipped |= times.skipped
            found += rows_of(bout, times, model, layers, floor)
            print(f"{model}: {', '.join(bout.ours)}", file=sys.stderr, flush=True)
        if model == "SmolLM2-135M" and not args.quick:
            keys = {name: key for key, bout in chosen.items() for name in bout.ours}
            memory_rows(found, keys, model, layers, args.dtype)
        speed += found
    shapes = [(384, 384)] if args.quick else [(384, 384), (1536, 384), (192, 576), (576, 576)]
    sources = {kind: [spectrum(kind, shape, args.seed) for shape in shapes] for kind in ("Gaussian", "1/k", "1/k²")}
    if not args.quick:
        sources["recorded momenta"] = list(record(seed=args.seed).values())
    with torch.no_grad():
        grades = quality({kind: found for kind, found in sources.items() if found})
    result = {
        "seed": args.seed,
        "rounds": rounds,
        "dtype": args.dtype,
        "machine": machine() | {"load": load},
        "versions": {name: importlib.metadata.version(name) for name in PEERS if _installed(name)},
        "speed": speed,
        "skipped": skipped,
        "quality": grades,
    }
    print(render(result))
    if not args.quick and wanted is None:
        write(result)


def write(result: dict[str, Any]) -> None:
    """Record a result and its page."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "optim.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (RESULTS / "optim.md").write_text(render(result), encoding="utf-8")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
