"""Merging beside mergekit on the same files, and the spectral methods beside full SVDs.

    python benchmarks/merge.py [--mergekit PATH] [--rounds N] [--threads N] [--models FOLDER] [--only shared,spectral]

Shared methods: SmolLM2-135M in bfloat16 and four models tuned from it (seeded changes: of rank 8, dense, shared and
sparse, 1% of a tensor's spread). One mergekit configuration a method is given to both sides. Each merge runs in a fresh process, both
sides in turn, every file in the page cache, the same dtype and number of threads. Seconds are those of the merge alone,
without imports; CPU seconds those of all its threads; the peak is the highest RssAnon of the whole process. mergekit runs
as it comes: `--lazy-unpickle`, a tokenizer copied, no progress bar. Both sides also merge in float32 once, and
those outputs are compared, tensor by tensor.

Spectral methods: seconds of one matrix on one thread, ours and the method written with `torch.linalg.svd` in float32, in
turn; both against full SVDs in float64. Changes of short fine-tunings of all-MiniLM-L6-v2, and made ones whose spectrum
decays. Writes benchmarks/results/merge.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from orthogonalize import RESULTS, machine, table
from spectral_merges import spectral_rows
from torch import Tensor

from deltaw.linalg import seeded_generator
from deltaw.models import CheckpointWriter, load_pretrained, load_tokenizer, open_checkpoint

TUNED = 4
BF16 = {"dtype": "bfloat16"}
#: method of mergekit -> (parameters of the merge, parameters of each model, models, needs a base)
METHODS: dict[str, tuple[dict, dict, int, bool]] = {
    "linear": ({}, {"weight": 0.25}, TUNED, False),
    "task_arithmetic": ({}, {"weight": 0.25}, TUNED, True),
    "ties": ({}, {"weight": 1.0, "density": 0.2}, TUNED, True),
    "dare_linear": ({}, {"weight": 0.25, "density": 0.5}, TUNED, True),
    "dare_ties": ({}, {"weight": 0.25, "density": 0.5}, TUNED, True),
    "slerp": ({"t": 0.4}, {}, 1, True),
    "model_stock": ({}, {}, TUNED, True),
}
SIDES = ("mergekit", "deltaw")
OUTPUTS = ("deltaw-float32", *SIDES)
#: masks are drawn from other streams, so two outputs agree in distribution only
RANDOM = ("dare_linear", "dare_ties")


# -- the models ------------------------------------------------------------------------------------------------------


def make_models(folder: Path, seed: int) -> tuple[Path, list[Path]]:
    """The base and the tuned models; those that are there already are kept."""
    base = folder / "base"
    if not base.exists():
        model = load_pretrained("smollm2-135m", dtype=torch.bfloat16)
        model.save_pretrained(base)
        load_tokenizer("smollm2-135m").save_pretrained(base)
    tuned = [folder / f"tuned-{seed}-{t}" for t in range(TUNED)]
    for t, path in enumerate(tuned):
        if path.exists():
            continue
        with open_checkpoint(base) as checkpoint, CheckpointWriter(path) as writer:
            for name in checkpoint:
                writer.write(name, tune(checkpoint.get(name), seed, name, t))
            for file in sorted(p for p in base.iterdir() if p.suffix in (".json", ".jinja")):
                writer.copy(file)
    return base, tuned


def tune(x: Tensor, seed: int, name: str, model: int) -> Tensor:
    """`x` with a change of rank 8, two dense ones, of which all models share one, and a sparse one; 1% of its spread together."""
    generator = seeded_generator(seed, "tune", name, model)
    wide = x.float()
    change = torch.randn(x.shape, generator=generator)
    if x.ndim == 2:
        change += torch.randn(len(x), 8, generator=generator) @ torch.randn(8, x.shape[1], generator=generator)
    common = torch.randn(x.shape, generator=seeded_generator(seed, "common", name))
    change += common  # what all models learned alike
    change += 5 * torch.randn(x.shape, generator=generator) * (torch.rand(x.shape, generator=generator) < 0.05)
    spread = wide.std().clamp_min(1e-6) if x.numel() > 1 else 1.0
    return (wide + 0.01 * spread * change / change.std().clamp_min(1e-6)).to(x.dtype)


def configuration(method: str, base: Path, tuned: list[Path], dtypes: dict) -> dict:
    whole, each, count, needs_base = METHODS[method]
    models = [{"model": str(m)} | ({"parameters": each} if each else {}) for m in tuned[:count]]
    content = {"merge_method": method, "models": models, **dtypes}
    return content | ({"base_model": str(base)} if needs_base else {}) | ({"parameters": whole} if whole else {})


# -- one merge in a process of its own -----------------------------------------------------------------------------


def work(side: str, config: Path, out: Path, threads: int) -> None:
    """The child: merge once and print the seconds."""
    torch.set_num_threads(threads)
    if side == "mergekit":
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        options = MergeOptions(quiet=True, lazy_unpickle=True, random_seed=0)
        begin, cpu = time.perf_counter(), time.process_time()
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(config.read_text())), str(out), options)
    else:
        from deltaw.merge import merge, read_mergekit

        begin, cpu = time.perf_counter(), time.process_time()
        merge(out=out, threads=threads, **read_mergekit(config))
    print(json.dumps({"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}))


def measure(side: str, config: Path, out: Path, threads: int, mergekit: Path | None) -> dict[str, float]:
    """Run the child and watch its memory."""
    paths = [str(Path(__file__).parent), *([str(mergekit)] if mergekit else []), os.environ.get("PYTHONPATH", "")]
    # ours stands before what is installed aside, which may bring packages of other versions
    path = os.pathsep.join([p for p in [paths[-1], *paths[:-1]] if p])
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, __file__, "--work", side, str(config), str(out), "--threads", str(threads)]
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{side} failed:\n{errors.read()[-3000:]}")
    return json.loads(lines[-1]) | {"peak": peak}


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def shared_rows(folder: Path, args: argparse.Namespace) -> list[dict]:
    base, tuned = make_models(folder, args.seed)
    for path in (base, *tuned):
        for file in path.glob("*.safetensors"):
            file.read_bytes()  # into the page cache
    rows = []
    for method in METHODS:
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(configuration(method, base, tuned, BF16)))
        runs: dict[str, list[dict]] = {s: [] for s in SIDES}
        for turn in range(args.rounds):
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                runs[side].append(measure(side, config, folder / side, args.threads, args.mergekit))
        row: dict = {"method": method, "bytes": sum(weights(p) for p in tuned[: METHODS[method][2]])}
        for side in SIDES:
            row[side] = {k: statistics.median(r[k] for r in runs[side]) for k in ("seconds", "cpu", "peak")}
        pairs = list(zip(runs["mergekit"], runs["deltaw"], strict=True))
        for key in ("seconds", "cpu"):
            row[f"{key}_ratio"] = statistics.median(a[key] / b[key] for a, b in pairs)
        row["peak_ratio"] = row["deltaw"]["peak"] / row["mergekit"]["peak"]
        row["differences"] = differences(method, folder, base, tuned, args)
        rows.append(row)
        print(method, *(f"{k} {row[k]:.2f}" for k in ("seconds_ratio", "cpu_ratio", "peak_ratio")), flush=True)
    return rows


def weights(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def differences(method: str, folder: Path, base: Path, tuned: list[Path], args: argparse.Namespace) -> dict:
    """‖a − b‖/‖b − base‖ of the two outputs over all tensors, merged in float32; and of each bfloat16 output from b."""
    config = folder / "exact.yaml"
    config.write_text(yaml.safe_dump(configuration(method, base, tuned, {"dtype": "float32"})))
    for side in SIDES:
        measure(side, config, folder / f"{side}-float32", args.threads, args.mergekit)
    found = {}
    with open_checkpoint(base) as start, open_checkpoint(folder / "mergekit-float32") as reference:
        for side in (*SIDES, "deltaw-float32"):
            error = change = along = 0.0
            with open_checkpoint(folder / side) as merged:
                for name in reference:
                    origin = start.get(name).float()
                    wanted, got = reference.get(name).float() - origin, merged.get(name).float() - origin
                    error += float((got - wanted).norm()) ** 2
                    change += float(wanted.norm()) ** 2
                    along += float(got.norm()) ** 2
            found[side] = math.sqrt(error / change)
            found[f"{side}_length"] = math.sqrt(along / change)
    for side in SIDES:
        shutil.rmtree(folder / f"{side}-float32")
    return found


# -- the tables ------------------------------------------------------------------------------------------------------


def geometric(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def render(result: dict) -> str:
    about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    shared, spectral = result["shared"], result["spectral"]
    speed = [
        [
            r["method"],
            *(f"{r[s]['seconds']:.2f}" for s in SIDES), f"{r['seconds_ratio']:.1f}",
            *(f"{r[s]['cpu']:.2f}" for s in SIDES), f"{r['cpu_ratio']:.1f}",
            *(f"{r[s]['peak'] / 1e6:.0f}" for s in SIDES), f"{r['peak_ratio']:.2f}",
        ]
        for r in shared
    ]  # fmt: skip
    means = {k: geometric([r[k] for r in shared]) for k in ("seconds_ratio", "cpu_ratio", "peak_ratio")}
    agree = [
        [
            r["method"],
            *("other masks" if r["method"] in RANDOM else f"{r['differences'][s]:.1e}" for s in OUTPUTS),
            *(f"{r['differences'][s + '_length']:.4f}" for s in OUTPUTS),
        ]
        for r in shared
    ]
    lines = [
        [
            r["method"], r["shape"], r["changes"], f"{r['svd_ms']:.0f}", f"{r['svd64_ms']:.0f}",
            f"{r['deltaw_ms']:.0f}", f"{r['ratio']:.2f}", f"{r['ratio64']:.2f}", f"{r['svd_error']:.1e}", f"{r['error']:.1e}",
        ]
        for r in spectral
    ]  # fmt: skip
    return "\n\n".join([
        "# Merging beside mergekit, and spectral methods beside full SVDs",
        f"Seed {result['seed']}, {result['rounds']} rounds, {result['merge_threads']} threads, mergekit "
        f"{result['mergekit']}, {about}. Load of the machine at the start: {result['load']:.1f}.",
        "SmolLM2-135M and four models tuned from it, bfloat16 in and out. Seconds of the merge (median), CPU seconds of all its "
        "threads, highest RssAnon of the process in MB. Ratios of time are mergekit / deltaw (median over rounds), that of "
        "memory deltaw / mergekit. CPU seconds say more where other work shares the cores.",
        table(["method", "mergekit s", "deltaw s", "ratio", "mergekit CPU s", "deltaw CPU s", "ratio", "mergekit MB",
               "deltaw MB", "ratio"], speed),
        f"Geometric means: {means['seconds_ratio']:.2f} times the throughput, {means['cpu_ratio']:.2f} times less CPU time, "
        f"{means['peak_ratio']:.2f} of the memory.",
        "Distance of an output from mergekit's in float32, over the length of that one's change of the base: ours in float32, then "
        "both in bfloat16, where the rounding of the output is most of it; and the lengths of the changes beside it. ties differs where "
        "entries equal the threshold, which changes of bfloat16 weights often do: ours keeps all of those, mergekit some.",
        table(["method", "deltaw float32", "mergekit bfloat16", "deltaw bfloat16", "length", "length", "length"], agree),
        "One matrix on one thread, four task vectors: milliseconds by full SVDs in float32, in float64 and ours (median), "
        "ratios (median over rounds), relative difference from full SVDs in float64 of those in float32 and of ours. Ours takes float64 "
        "Gram matrices where weak directions count, and float32 ones for leading triplets where that keeps 5e-5.",
        table(["method", "shape", "changes", "SVD ms", "float64 SVD ms", "deltaw ms", "ratio", "to float64", "SVD difference",
               "deltaw difference"], lines),
        f"Geometric mean of the ratios: {geometric([r['ratio'] for r in spectral]):.2f} to SVDs in float32, "
        f"{geometric([r['ratio64'] for r in spectral]):.2f} to SVDs in float64; largest difference "
        f"{max(r['error'] for r in spectral):.1e}. Directions below the rounding of the input stay empty in ours, where an SVD gives "
        "them weight; one of 384 is a difference of 5e-2 for iso-c.",
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, help="folder with an installed mergekit (default: importable)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, help="keep the models here (default: a temporary folder)")
    parser.add_argument("--only", default="shared,spectral", help="parts to run; the others stay as recorded")
    parser.add_argument("--work", nargs=3, metavar=("SIDE", "CONFIG", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        side, config, out = args.work
        work(side, Path(config), Path(out), args.threads)
        return
    record = RESULTS / "merge.json"
    result = json.loads(record.read_text()) if record.exists() else {"shared": [], "spectral": []}
    load = os.getloadavg()[0]
    if "shared" in args.only:
        with tempfile.TemporaryDirectory() as temporary:
            result["shared"] = shared_rows(args.models or Path(temporary), args)
        result |= {"rounds": args.rounds, "merge_threads": args.threads, "load": load, "mergekit": "0.1.5"}
    if "spectral" in args.only:
        result["spectral"] = spectral_rows(args.seed)
    result |= {"seed": args.seed, "machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    record.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    record.with_suffix(".md").write_text(render(result))
    print(render(result))


if __name__ == "__main__":
    main()
