"""What several verbs share: option parsing, output that suits a terminal or a program, progress."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
OptionList = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", help="Option of the method as name=value; repeatable. See `deltaw methods show ID`."
    ),
]


def main_process() -> bool:
    """False on all but the first process of a distributed launch."""
    return int(os.environ.get("RANK", "0")) == 0


def await_first_process(seconds: float = 10.0) -> None:
    """Let the first process of a launch report an error that all of them meet.

    Its launcher then ends the others, this one within the wait: the message appears once. Who is still there after
    it has an error of its own to report.
    """
    if not main_process():
        time.sleep(seconds)


def leave_group() -> None:
    """Close the connections between the processes of a launch."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def print_json(data: Any) -> None:
    """JSON to standard output, from the first process only."""
    if main_process():
        sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n")


def say(text: str) -> None:
    """A result line to standard output, from the first process only."""
    if main_process():
        typer.echo(text)


def refuse_existing(out: str, mend: str = "give another --out") -> None:
    """Stop before any work when the output folder is there already: it would be refused at the end."""
    from pathlib import Path

    from deltaw.errors import CheckpointError

    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise CheckpointError(f"output folder {out!r} exists and is not empty; {mend}")


def show(renderable: Any) -> None:
    """A rich table to standard output, from the first process only."""
    if main_process():
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(renderable)


def progress_wanted() -> bool:
    """Progress goes to a terminal only."""
    return main_process() and sys.stderr.isatty()


def parse_options(items: Sequence[str] | None) -> dict[str, Any]:
    """["rank=8", "use_dora=true", "targets=[q,v]"] as a dict; values are read as YAML."""
    import yaml

    from deltaw.errors import OptionError

    found: dict[str, Any] = {}
    for item in items or ():
        name, sign, value = item.partition("=")
        if not sign or not name.strip():
            raise OptionError(f"option {item!r} is not of the form name=value")
        try:
            found[name.strip().replace("-", "_")] = _number(yaml.safe_load(value))
        except yaml.YAMLError:
            raise OptionError(f"the value of option {item!r} cannot be read") from None
    return found


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; a user means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def split_names(value: str) -> str | list[str]:
    """ "q,v" as ["q", "v"]; a regular expression (re:…) and a single name stay whole."""
    if value.startswith("re:") or "," not in value:
        return value
    return [v.strip() for v in value.split(",") if v.strip()]
