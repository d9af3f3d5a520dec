"""`deltaw explain`: which parameter gets which update, and why, before a step is taken."""

from __future__ import annotations

from typing import Annotated

import typer

from deltaw.cli.common import Json, OptionList, parse_options, print_json, show


def command(
    model: Annotated[str, typer.Argument(help="Model folder, packaged or hub name.")],
    optimizer: Annotated[str, typer.Option(help="Optimizer id.")] = "normuon",
    task: Annotated[str, typer.Option(help="auto, classification, causal-lm or base.")] = "auto",
    option: OptionList = None,
    as_json: Json = False,
) -> None:
    """Print the routing plan of an optimizer over a model."""
    from deltaw.optim import explain
    from deltaw.train import load

    plan = explain(load(model, task), optimizer, **parse_options(option))
    if as_json:
        print_json(plan.as_dict())
    else:
        show(plan.table())
