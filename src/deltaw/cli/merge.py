"""`deltaw merge`: join fine-tuned checkpoints of one base into one."""

from __future__ import annotations

from typing import Annotated

import typer

from deltaw.cli.common import Json, OptionList, parse_options, print_json, progress_wanted, say


def command(
    model: Annotated[list[str], typer.Option(help="Folder of a tuned model; repeat for each.")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
    base: Annotated[str | None, typer.Option(help="Folder of the base model they started from.")] = None,
    method: Annotated[str, typer.Option(help="Merge method id.")] = "task-arithmetic",
    weight: Annotated[list[float] | None, typer.Option(help="Weight of each model, in the same order.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: the models'].")] = None,
    option: OptionList = None,
    threads: Annotated[int, typer.Option(help="Threads that read and merge.")] = 2,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted merge of equal options.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    as_json: Json = False,
) -> None:
    """Merge models tensor by tensor: memory does not grow with their number or size."""
    from deltaw import catalogue
    from deltaw.merge import merge

    settings = parse_options(option)
    card = catalogue.get(method, "merge")
    catalogue.check_options(card, settings)
    merge(
        base,
        model,
        card.id,
        out,
        weights=weight or None,
        dtype=dtype,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        progress=progress_wanted(),
        **settings,
    )
    if as_json:
        print_json({"out": out, "method": card.id, "base": base, "models": model, "options": settings})
    else:
        say(out)
