"""`deltaw merge`: join fine-tuned checkpoints of one base into one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deltaw.cli.common import Json, OptionList, parse_options, print_json, progress_wanted, say, split_names


def command(
    model: Annotated[list[str], typer.Option(help="Folder of a tuned model; repeat for each.")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
    base: Annotated[str | None, typer.Option(help="Folder of the base model they started from.")] = None,
    method: Annotated[str, typer.Option(help="Merge method id.")] = "task-arithmetic",
    weight: Annotated[list[float] | None, typer.Option(help="Weight of each model, in the same order.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: the models'].")] = None,
    option: OptionList = None,
    heads: Annotated[str, typer.Option(help="Output heads: method, average, base, drop or matrix.")] = "method",
    embeddings: Annotated[str, typer.Option(help="Embeddings: method, average, base or matrix.")] = "method",
    exclude: Annotated[
        str | None, typer.Option(help="Tensors to copy from the base: names, globs, re:…; comma-separated.")
    ] = None,
    missing: Annotated[str, typer.Option(help="A tensor that some model lacks: error, average or base.")] = "error",
    files: Annotated[str, typer.Option(help="Config and tokenizer from: base, first or none.")] = "base",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done to each tensor, and write nothing.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads that read and merge.")] = 2,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted merge of equal options.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    as_json: Json = False,
) -> None:
    """Merge models tensor by tensor: memory does not grow with their number or size."""
    from deltaw import catalogue
    from deltaw.merge import merge, plan

    settings = parse_options(option)
    card = catalogue.get(method, "merge")
    catalogue.check_options(card, settings)
    rules: dict[str, Any] = {
        "weights": weight or None,
        "dtype": dtype,
        "threads": threads,
        "heads": heads,
        "embeddings": embeddings,
        "exclude": split_names(exclude) if exclude else (),
        "missing": missing,
    }
    if dry_run:
        found = plan(base, model, card.id, **rules, **settings)
        if as_json:
            print_json(found.as_dict())
        else:
            say(str(found))
        return
    merge(
        base,
        model,
        card.id,
        out,
        **rules,
        files=files,
        resume=resume,
        overwrite=overwrite,
        progress=progress_wanted(),
        **settings,
    )
    if as_json:
        print_json({"out": out, "method": card.id, "base": base, "models": model, "options": settings})
    else:
        say(out)
