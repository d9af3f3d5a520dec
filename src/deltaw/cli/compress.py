"""`deltaw compress`: two thin matrices for every wide one, under one parameter budget."""

from __future__ import annotations

from typing import Annotated

import typer

from deltaw.cli.common import Json, OptionList, parse_options, print_json, refuse_existing, say, show, split_names


def command(
    model: Annotated[str, typer.Argument(help="Model folder, packaged or hub name.")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
    method: Annotated[str, typer.Option(help="Compression method id.")] = "svd-llm",
    ratio: Annotated[float, typer.Option(help="Kept share of the targeted layers' parameters in total.")] = 0.6,
    calibration: Annotated[str | None, typer.Option(help="Text to calibrate on: as --data of `deltaw adapt`.")] = None,
    samples: Annotated[int, typer.Option(help="At most this many calibration examples.")] = 256,
    max_length: Annotated[int, typer.Option(help="Tokens per calibration example.")] = 128,
    targets: Annotated[str, typer.Option(help="Which matrices, as for `deltaw adapt`.")] = "all-linear",
    allocation: Annotated[str, typer.Option(help="uniform, energy or loss: how the budget is shared.")] = "uniform",
    dense: Annotated[
        bool, typer.Option("--dense", help="Write the original architecture, readable by plain transformers.")
    ] = False,
    option: OptionList = None,
    as_json: Json = False,
) -> None:
    """Compress a model's linear layers, calibrated on text where the method uses it."""
    refuse_existing(out)
    from deltaw import catalogue
    from deltaw.compress import compress, save_compressed
    from deltaw.errors import OptionError
    from deltaw.models import load_tokenizer
    from deltaw.train import batches, load, load_data, tokenise

    card = catalogue.get(method, "compress")
    settings = parse_options(option)
    catalogue.check_options(card, settings)
    if samples < 1:
        raise OptionError(f"samples is {samples}; expected at least 1 calibration example")
    net, tokenizer = load(model), load_tokenizer(model)
    calibrating = None
    if calibration is not None:
        found = load_data(calibration, validation_fraction=0.0)
        texts = [{"text": e["text"] if "text" in e else e["prompt"] + e["completion"]} for e in found.train[:samples]]
        calibrating = [
            b for _, b in batches(tokenise(texts, tokenizer, "classification", max_length), tokenizer, "classification")
        ]
    report = compress(
        net, card.id, ratio, calibration=calibrating, targets=split_names(targets), allocation=allocation, **settings
    )
    save_compressed(net, out, dense=dense, tokenizer=tokenizer)
    if as_json:
        print_json({"out": out, **report.as_dict()})
    else:
        show(report.table())
        say(out)
