"""`deltaw export`: a trained structure as a plain LoRA, or folded into the weights."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deltaw.cli.common import Json, print_json, refuse_existing, say

app = typer.Typer(help="Export a trained structure as a plain LoRA or as folded weights.", no_args_is_help=True)
Adapter = Annotated[str, typer.Argument(help="Adapter folder.")]
Out = Annotated[str, typer.Option(help="Folder to write.")]
Base = Annotated[str | None, typer.Option(help="Base model, when it moved.")]


@app.command("lora")
def lora(
    adapter: Adapter,
    out: Out,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the LoRA [default: exact where the structure is low-rank].")
    ] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of each matrix's squared norm.")] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Write a plain LoRA (HF peft format) that serving engines read, with the error per matrix."""
    refuse_existing(out)
    from deltaw.adapters import export_lora

    report = export_lora(_load(adapter, base), out, rank=rank, energy=energy)
    if as_json:
        print_json({"out": out, **report.as_dict()})
    else:
        say(str(report))
        say(out)


@app.command("folded")
def folded(adapter: Adapter, out: Out, base: Base = None, as_json: Json = False) -> None:
    """Write a full model with ΔW added to its weights, readable by plain transformers."""
    refuse_existing(out)
    from pathlib import Path

    from deltaw.adapters import fold
    from deltaw.models import atomic_folder, load_tokenizer
    from deltaw.train import save_model

    net = fold(_load(adapter, base))
    with atomic_folder(out) as partial:
        save_model(net, partial)
        if any(Path(adapter).glob("tokenizer*")):
            load_tokenizer(adapter).save_pretrained(partial)
    if as_json:
        print_json({"out": out})
    else:
        say(out)


def _load(adapter: str, base: str | None) -> Any:
    """The base model with the adapter on it."""
    from deltaw.adapters import adapter_names
    from deltaw.errors import CheckpointError
    from deltaw.train import load

    net = load(adapter, base=base)
    if not adapter_names(net):
        raise CheckpointError(f"{adapter} holds a whole model and no adapter: there is nothing to export")
    return net
