"""Whether OSRM's start makes LoRA adapters of different tasks merge better: four or eight adapters in one.

    python benchmarks/osrm_merging.py [--workers N] [--minutes M] [--quick]

On the tasks of `merge_tasks.py` with their frozen heads: one adapter a task, as LoRA and as OSRM from the inputs of the
seven other tasks, with A trained or kept, at several rates. Those of a group leave as plain LoRAs and are merged without the
base by the sum of their changes, times a scale that is chosen on validation sentences. A finished run (all tasks of a
method, rate and seed) is one file of runs/osrm_merging. Writes benchmarks/results/osrm_merging.json and .md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from adapters_runs import sites_of
from merge_tasks import (
    QUICK,
    TASKS,
    Settings,
    examples,
    fresh,
    groups,
    load_tokenizer_once,
    make_base,
    plan,
    score,
    set_head,
    take_steps,
    training_batches,
)
from orthogonalize import RESULTS, machine, table
from resumable import finished, run_all

from deltaw.adapters import adapt, export_lora, load_adapter
from deltaw.merge import merge_adapters
from deltaw.models import capture
from deltaw.train import collator, tokenise

RUNS = Path(__file__).parents[1] / "runs" / "osrm_merging"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "osrm": ("osrm", {}),
    "osrm, A kept": ("osrm", {"freeze_A": True}),
}
RATES = (1e-3, 3e-3)
SCALES = (0.3, 0.5, 0.7, 1.0)
#: the paper takes 100 samples a task
SETTINGS = replace(Settings(), counts=(4, 8), sentences=100, train=600)


@dataclass(frozen=True)
class Job:
    """Adapters of all tasks by one method, rate and seed, alone and merged."""

    method: str
    lr: float
    seed: int
    settings: Settings
    scales: tuple[float, ...] = SCALES

    @property
    def about(self) -> dict[str, Any]:
        return {"method": self.method, "lr": self.lr, "seed": self.seed}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def path(self, folder: Path) -> Path:
        return folder / f"{self.method.replace(', ', '-').replace(' ', '-')}-{self.lr:g}-{self.seed}.json"

    def __str__(self) -> str:
        return f"{self.method} at {self.lr:g}, seed {self.seed}"


@lru_cache(maxsize=8)
def inputs_of(task: str, settings: Settings) -> Any:
    """Second moments of what enters each matrix of the base from training sentences of a task."""
    net = fresh()
    return capture(net, sites_of(net), training_batches(task, 0, settings.sentences, settings))


def trained(job: Job, task: str, folder: Path) -> Any:
    """The base with a task's head and its adapter."""
    settings, (id, options) = job.settings, METHODS[job.method]
    net = fresh()
    set_head(net, task, folder)
    if id == "osrm":
        options = options | {"stats": [inputs_of(other, settings) for other in settings.tasks if other != task]}
    adapt(net, id, [s.module for s in sites_of(net)], rank=settings.adapter_rank, seed=job.seed, **options)
    found = examples(task, "train", settings.train, job.seed)
    tokenizer = load_tokenizer_once()
    rows, build = (
        tokenise(found, tokenizer, "classification", settings.max_length),
        collator(tokenizer, "classification"),
    )
    made = [build([rows[i] for i in chunk]) for chunk in plan(rows, settings, job.seed)]
    take_steps(net, made, job.lr, settings.warmup, settings.clip, job.seed)
    return net


def take(job: Job, folder: Path) -> tuple[dict[str, Any], str]:
    """Accuracy of each task's adapter alone, and of the merge of its group at the best scale for each number of adapters."""
    start, settings = time.process_time(), job.settings
    record: dict[str, Any] = {"alone": {}, "merged": {}, "scale": {}, "validation": {}}
    with tempfile.TemporaryDirectory() as place:
        held = Path(place)
        for task in settings.tasks:
            net = trained(job, task, folder)
            record["alone"][task] = score(net, task, "test", folder, settings).accuracy
            export_lora(net, held / task)
        for count in settings.counts:
            tried = [on_tasks(held, folder, settings, count, scale, "validation") for scale in job.scales]
            means = [
                (statistics.mean(r for r, _ in t.values()), -statistics.mean(l for _, l in t.values())) for t in tried
            ]
            best = job.scales[max(range(len(means)), key=means.__getitem__)]
            record["validation"][str(count)] = [[round(a, 4), round(-l, 4)] for a, l in means]
            record["scale"][str(count)] = best
            tested = on_tasks(held, folder, settings, count, best, "test")
            record["merged"][str(count)] = {task: right for task, (right, _) in tested.items()}
    said = "".join(f", {n} in one {statistics.mean(r.values()):.3f}" for n, r in record["merged"].items())
    cpu = {"cpu_s": round(time.process_time() - start, 2)}
    return cpu | record, f"alone {statistics.mean(record['alone'].values()):.3f}{said}"


def on_tasks(
    held: Path, folder: Path, settings: Settings, count: int, scale: float, part: str
) -> dict[str, tuple[float, float]]:
    """{task: accuracy and loss} of the merge of each task's group."""
    found: dict[str, tuple[float, float]] = {}
    for group in groups(settings, count):
        adapters = [held / task for task in group]
        merge_adapters(adapters, held / "merged", "task-arithmetic", {"scale": scale}, overwrite=True)
        net = load_adapter(fresh(), held / "merged")
        for task in group:
            seen = score(net, task, part, folder, settings)
            found[task] = (seen.accuracy, seen.loss)
    return found


# -- the page --------------------------------------------------------------------------------------------------------


def points(rows: Sequence[Mapping[str, Any]], count: str | None) -> list[float]:
    """Accuracy in per cent, a number a seed and task: alone, or of `count` adapters in one."""
    return [100 * x for row in rows for x in (row["alone"] if count is None else row["merged"][count]).values()]


def paired(values: Sequence[float], others: Sequence[float]) -> str:
    """Mean difference ± its standard error over seeds and tasks; below two of them it is a tie."""
    gaps = [a - b for a, b in zip(values, others, strict=True)]
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{mean:+.1f} ± {error:.1f}" + (" (tie)" if abs(mean) <= 2 * error else "")


def best_rate(rows: Sequence[Mapping[str, Any]], method: str, count: str) -> float:
    """The rate of highest accuracy on the validation sentences, merged."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            found.setdefault(row["lr"], []).append(max(a for a, _ in row["validation"][count]))
    return max(found, key=lambda lr: statistics.mean(found[lr]))


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown page."""
    settings, rows = result["settings"], result["rows"]
    about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    methods = list(dict.fromkeys(row["method"] for row in rows))
    rates = sorted({row["lr"] for row in rows})
    counts = [str(n) for n in settings["counts"]]
    of = {(m, lr): [r for r in rows if (r["method"], r["lr"]) == (m, lr)] for m in methods for lr in rates}
    first = methods[0]
    every = []
    for lr in rates:
        for m in methods:
            cells = [m, f"{lr:g}", f"{statistics.mean(points(of[m, lr], None)):.1f}"]
            for n in counts:
                scales = ", ".join(dict.fromkeys(f"{r['scale'][n]:g}" for r in of[m, lr]))
                cells += [f"{statistics.mean(points(of[m, lr], n)):.1f}", scales]
                cells.append("–" if m == first else paired(points(of[m, lr], n), points(of[first, lr], n)))
            every.append([*cells[:3], "–" if m == first else paired(points(of[m, lr], None), points(of[first, lr], None)),
                          *cells[3:]])  # fmt: skip
    best = []
    for n in counts:
        chosen = {m: best_rate(rows, m, n) for m in methods}
        for m in methods:
            mine, theirs = of[m, chosen[m]], of[first, chosen[first]]
            best.append([n, m, f"{chosen[m]:g}", f"{statistics.mean(points(mine, None)):.1f}",
                         f"{statistics.mean(points(mine, n)):.1f}", paired(points(mine, n), points(mine, None)),
                         "–" if m == first else paired(points(mine, n), points(theirs, n))])  # fmt: skip
    heads = [h for n in counts for h in (f"{n} in one", "scale", f"to {first}")]
    return "\n\n".join(
        [
            "# Adapters that will be merged: LoRA and OSRM",
            f"Seeds {', '.join(map(str, result['seed']))}, {about}.",
            f"all-MiniLM-L6-v2 on the {len(settings['tasks'])} tasks of *every merge method* with their frozen heads: one adapter "
            f"of rank {settings['adapter_rank']} a task on all matrices, {settings['train']} sentences, {settings['epochs']} "
            f"epochs, AdamW. OSRM starts from {settings['sentences']} sentences of each of the other tasks; with *A kept* only B "
            "is trained. Merged, in the order of the tasks, by the sum of the changes times the scale of "
            f"{', '.join(f'{s:g}' for s in result['scales'])} that was best on {settings['validation']} validation sentences a "
            f"task, without the base in memory. Accuracy in per cent on {settings['test']} test sentences a task, mean of tasks "
            "and seeds; paired differences ± one standard error over tasks and seeds, below two of which they are ties. "
            f"{len(rows)} runs in {result['cpu_minutes']:g} CPU minutes.",
            "Each method at the rate that was best for the merged model on the validation sentences:",
            table(["adapters in one", "method", "lr", "alone", "merged", "merged - alone", f"to {first}, merged"], best),
            "At equal rates:",
            table(["method", "lr", "alone", f"to {first}", *heads], every),
        ]
    ) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=SETTINGS.seeds)
    parser.add_argument("--minutes", type=float, default=200, help="CPU minutes after which no run starts")
    parser.add_argument("--quick", action="store_true", help="a few steps of four tasks, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = QUICK if args.quick else SETTINGS
    rates, seeds = (RATES[:1], range(1)) if args.quick else (RATES, range(args.seeds))
    jobs = [Job(m, lr, seed, settings) for seed in seeds for lr in rates for m in METHODS]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if args.quick else RUNS
        folder.mkdir(parents=True, exist_ok=True)
        make_base(folder, settings)
        problems, left = run_all(take, jobs, args.workers, args.minutes, folder)
        rows = [record for job in jobs if (record := finished(job, folder)) is not None]
    if problems or left:
        sys.exit("nothing written:\n" + "\n".join([*problems, *([f"{left} runs were not started"] if left else [])]))
    result = {
        "seed": list(seeds), "machine": machine(), "settings": asdict(settings), "scales": SCALES,
        "labels": {t: TASKS[t].labels for t in settings.tasks},
        "cpu_minutes": round(sum(row["cpu_s"] for row in rows) / 60, 1),
        "rows": [{k: v for k, v in row.items() if k not in ("fingerprint", "load")} for row in rows],
    }  # fmt: skip
    print(render(result))
    if not args.quick:
        (RESULTS / "osrm_merging.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        (RESULTS / "osrm_merging.md").write_text(render(result), encoding="utf-8")


if __name__ == "__main__":
    main()
