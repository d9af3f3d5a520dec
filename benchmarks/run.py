"""All benchmark suites behind one command, one after the other.

    python benchmarks/run.py [SUITE …] [--quick] [--list]

Each is a script of its own with the options that its recorded tables were made with; what it writes to
benchmarks/results carries commit, seed and machine. Without names all run, in the order of the list. `--quick` takes the
smallest size of each, which writes nothing. The long ones are resumable: give the command again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """A script with the options of its record, and about how many CPU minutes it takes on two quiet cores."""

    about: str
    minutes: int
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] | None = ("--quick",)  # None: it has no small size


SUITES = {
    "orthogonalize": Suite("orthogonalization beside torch's Muon iteration", 3, ("--repeats", "11")),
    "optim": Suite("a step of every optimizer beside its peers", 22, ("--layers", "6", "--rounds", "7")),
    "adapters": Suite("cost of every structure beside peft", 8),
    "merge": Suite("merging beside mergekit, which must be importable", 15, ("--rounds", "3"), None),
    "weight_matching": Suite("linear mode connectivity before and after weight matching", 2),
    "optim_learning": Suite("how eight optimizers learn text", 75, ("--workers", "2"), ("--smoke",)),
    "adapters_quality": Suite("quality of every structure at one budget", 180, ("--workers", "2")),
    "adapters_export": Suite("what a plain LoRA keeps of every structure", 12),
    "osrm_merging": Suite("whether OSRM's start makes adapters merge better", 52, ("--workers", "2")),
    "merge_quality": Suite("quality of every merge of 2, 4 and 8 models", 95, ("--workers", "2")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--quick", action="store_true", help="the smallest size of each")
    parser.add_argument("--list", action="store_true", help="name the suites and stop")
    args = parser.parse_args()
    unknown = set(args.suites) - set(SUITES)
    if unknown:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    if args.list:
        for name, suite in SUITES.items():
            print(f"{name:18} {suite.minutes:4} CPU min  {suite.about}")
        return
    failed = []
    for name in args.suites or SUITES:
        suite = SUITES[name]
        if args.quick and suite.quick is None:
            print(f"{name} has no small size and is left out", flush=True)
            continue
        command = [sys.executable, str(HERE / f"{name}.py"), *((suite.quick or ()) if args.quick else suite.arguments)]
        print("$", " ".join(command), flush=True)
        if subprocess.run(command, env={"OMP_NUM_THREADS": "1"} | os.environ, check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
