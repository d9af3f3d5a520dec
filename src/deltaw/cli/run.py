"""`deltaw run`: a pipeline from a recipe to a report."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from deltaw.cli.common import Json, main_process, print_json, say


def command(
    recipe: Annotated[str, typer.Argument(help="Built-in recipe or YAML file.")] = "sentiment",
    out: Annotated[str | None, typer.Option(help="Folder of the run [default: runs/NAME].")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small version that shows the form of the result.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All methods, without the limits on time.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed [default: the recipe's].")] = None,
    resume: Annotated[str, typer.Option(help="auto: continue a run of equal options; never: start afresh.")] = "auto",
    demo_data: Annotated[
        str | None, typer.Option(help="The demo's text archive, when it cannot be downloaded.")
    ] = None,
    progress: Annotated[str, typer.Option(help="auto: on a terminal; lines: always; none.")] = "auto",
    as_json: Json = False,
) -> None:
    """Adapt, merge, compress and inspect a model as a recipe says, and write a report.

    A killed run continues where it stopped when the same command is given again.
    """
    from deltaw.errors import OptionError, unknown_name
    from deltaw.recipes import Cell, run

    if quick and full:
        raise OptionError("--quick and --full exclude each other")
    if progress not in ("auto", "lines", "none"):
        raise unknown_name("value of --progress", progress, ["auto", "lines", "none"])
    lines = progress == "lines" or (progress == "auto" and main_process() and sys.stderr.isatty())

    def told(name: str, cell: Cell) -> None:
        hits = cell.result.get("correct")
        if isinstance(hits, dict):
            hits = [h for values in hits.values() for h in values]
        score = f"accuracy {sum(hits) / len(hits):.3f}" if hits else ""
        typer.echo(f"  {name:32s} {'kept' if cell.reused else f'{cell.seconds:6.1f} s':>9s}  {score}", err=True)

    mode = "quick" if quick else "full" if full else "default"
    result = run(
        recipe, out, mode=mode, seed=seed, resume=resume, demo_data=demo_data, progress=told if lines else None
    )
    if as_json:
        print_json(
            {
                "report": str(result.report),
                "seconds": round(result.seconds, 1),
                "reused": result.reused,
                "rows": result.rows,
            }
        )
    else:
        if lines:
            typer.echo(f"  done in {result.seconds:.0f} s", err=True)
        say(str(result.report))
