"""`deltaw eval` and `deltaw predict`: score a model on labelled data, or label new text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.common import Json, main_process, print_json, say

Model = Annotated[str, typer.Argument(help="Folder written by deltaw or transformers.")]
Data = Annotated[str, typer.Option(help="As for `deltaw adapt`.")]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens per example [default: as trained, else 128].")]


def eval_command(
    model: Model,
    data: Data,
    split: Annotated[str, typer.Option(help="train, validation or test [default: test, else all rows].")] = "",
    text_column: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    max_length: Length = None,
    as_json: Json = False,
) -> None:
    """Score a model: accuracy for classification, perplexity for language modelling."""
    from deltaw.errors import DataError, unknown_name
    from deltaw.train import evaluate, load_data

    if split not in ("", "train", "validation", "test"):
        raise unknown_name("split", split, ("train", "validation", "test"))
    net, tokenizer, record = _open(model)
    names = record.get("label_names") or _config_labels(net)
    # the data may hold the values of the training data, or the names that they were given
    labels = {**dict(zip(names, names, strict=True)), **record["label_map"]} if record.get("label_map") else names
    columns = record.get("columns", {})
    found = load_data(
        data,
        task=record.get("task", "classification" if labels else "causal-lm"),
        text_column=text_column or columns.get("text"),
        label_column=label_column or columns.get("label"),
        prompt_column=columns.get("prompt"),
        completion_column=columns.get("completion"),
        labels=labels or None,
        validation_fraction=0.0,
    )
    chosen = split or ("test" if found.test else "train")
    examples = getattr(found, chosen, None)
    if not examples:
        raise DataError(f"{found.source} has no {chosen!r} rows")
    result = evaluate(net, tokenizer, examples, task=found.task, max_length=max_length or _length(record))
    if as_json:
        print_json({"model": model, "data": found.source, "split": chosen, **result.as_dict()})
    elif result.accuracy is not None:
        say(
            f"accuracy {result.accuracy:.4f}, loss {result.loss:.4f} on {result.count} {chosen} examples of {found.source}"
        )
    else:
        say(
            f"perplexity {result.perplexity:.3f}, loss {result.loss:.4f} on {result.count} {chosen} tokens of {found.source}"
        )


def predict_command(
    model: Model,
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts to label; without any, lines of standard input.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A text file with one example a line.")] = None,
    max_length: Length = None,
    as_json: Json = False,
) -> None:
    """Label text with a trained classifier, or continue prompts with a language model."""
    import sys

    from deltaw.errors import DataError

    if data is not None:
        if not Path(data).is_file():
            raise DataError(f"file {data!r} does not exist")
        try:
            lines = Path(data).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as e:
            raise DataError(f"file {data!r} is not UTF-8 text ({e}); convert it first") from None
    else:
        lines = text or sys.stdin.read().splitlines()
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise DataError("no text to predict on: give it as arguments, with --data FILE, or on standard input")
    net, tokenizer, record = _open(model)
    if record.get("task") == "causal-lm" or not _config_labels(net):
        rows: list[dict[str, Any]] = _continue(net, tokenizer, lines)
    else:
        rows = _label(
            net, tokenizer, lines, record.get("label_names") or _config_labels(net), max_length or _length(record)
        )
    if as_json:
        print_json(rows)
        return
    for row in rows:
        say(f"{row['label']}\t{row['probability']:.4f}\t{row['text']}" if "label" in row else row["continuation"])


def _open(model: str) -> tuple[Any, Any, dict[str, Any]]:
    from deltaw.errors import CheckpointError
    from deltaw.models import load_tokenizer
    from deltaw.train import load, read_record

    record = read_record(model) or {}
    net = load(model)
    if not _config_labels(net) and not getattr(net, "can_generate", bool)():
        raise CheckpointError(
            f"{model} is a {type(net).__name__}, which neither classifies nor continues text; train a head on it with "
            "`deltaw adapt`, or give a classifier or a language model"
        )
    folder = Path(model)
    has_tokenizer = not folder.is_dir() or any(folder.glob("tokenizer*"))
    return net, load_tokenizer(model if has_tokenizer else record.get("base", model)), record


def _length(record: dict[str, Any]) -> int:
    return int(record.get("options", {}).get("max_length", 128))


def _config_labels(net: Any) -> list[str]:
    if not type(net).__name__.endswith("ForSequenceClassification"):
        return []
    return [net.config.id2label[i] for i in sorted(net.config.id2label)]


def _label(net: Any, tokenizer: Any, lines: list[str], labels: list[str], length: int) -> list[dict[str, Any]]:
    from deltaw.train import class_logits

    probabilities = class_logits(net, tokenizer, [{"text": t} for t in lines], max_length=length).softmax(-1)
    best = probabilities.max(-1)
    return [
        {"text": t, "label": labels[int(i)], "probability": float(p)}
        for t, i, p in zip(lines, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _continue(net: Any, tokenizer: Any, lines: list[str], tokens: int = 64) -> list[dict[str, Any]]:
    import torch

    rows = []
    for line in lines:
        ids = tokenizer(line, return_tensors="pt")
        with torch.no_grad():
            out = net.generate(
                **ids,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        rows.append(
            {
                "text": line,
                "continuation": tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True),
            }
        )
    return rows if main_process() else []
