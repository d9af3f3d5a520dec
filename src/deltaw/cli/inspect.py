"""`deltaw inspect`: what a fine-tune did to a model."""

from __future__ import annotations

from typing import Annotated

import typer

from deltaw.cli.common import Json, print_json, refuse_existing, say, show, split_names


def command(
    base: Annotated[str, typer.Argument(help="Folder of the base model.")],
    tuned: Annotated[str, typer.Argument(help="Folder of the tuned model or adapter.")],
    targets: Annotated[str, typer.Option(help="Which matrices, as for `deltaw adapt`.")] = "all-linear",
    top_k: Annotated[int, typer.Option(help="Leading singular vectors that are looked at.")] = 10,
    epsilon: Annotated[float, typer.Option(help="An intruder's largest cosine with any vector of the base.")] = 0.5,
    out: Annotated[str | None, typer.Option(help="Folder for inspection.json and the plots.")] = None,
    as_json: Json = False,
) -> None:
    """Spectrum, effective rank and intruder dimensions of every changed matrix."""
    if out is not None:
        refuse_existing(out)
    from pathlib import Path

    from deltaw.adapters import fold
    from deltaw.inspect import inspect
    from deltaw.models import atomic_folder
    from deltaw.train import load, read_record

    record = read_record(tuned)
    adapter = (Path(tuned) / "adapter_config.json").is_file() or (record is not None and record["kind"] == "adapter")
    changed = fold(load(tuned)) if adapter else tuned
    found = inspect(base, changed, targets=split_names(targets), top_k=top_k, epsilon=epsilon)
    if out is not None:
        with atomic_folder(out) as partial:
            found.save_json(Path(partial) / "inspection.json")
            found.plots(Path(partial))
    if as_json:
        print_json(found.as_dict())
        return
    show(found.table())
    if out is not None:
        say(out)
