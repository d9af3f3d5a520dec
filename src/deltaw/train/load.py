"""`deltaw.load`: any folder that deltaw (or transformers) wrote, as a model ready to use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from deltaw.errors import CheckpointError
from deltaw.models import load_pretrained, read_json
from deltaw.train.run import RECORD


def read_record(path: str | Path) -> dict[str, Any] | None:
    """What `deltaw adapt` noted beside a model (task, labels, base, options), or None."""
    file = Path(path) / RECORD
    if not file.is_file():
        return None
    record = read_json(file)
    missing = sorted({"kind", "task"} - set(record))
    if missing:
        raise CheckpointError(f"{file} lacks the entry {missing[0]!r}: the folder was damaged; write it again")
    return record


def load(path: str | Path, task: str = "auto", *, base: str | Path | None = None) -> nn.Module:
    """Load a model folder in eval mode: plain, factored (`deltaw compress`) or adapter (`deltaw adapt`).

    Args:
        path: the folder, or a packaged or hub model.
        task: "classification", "causal-lm", "base" or "auto" (what the folder says).
        base: for an adapter, the base model's folder when it moved since the adapter was written.

    Raises:
        CheckpointError: missing, corrupt or pickled files; an adapter whose base is not known or does not fit.
    """
    folder = Path(path)
    record = read_record(folder)
    if record is not None and task == "auto":
        task = record["task"]
    if not (folder / "adapter_config.json").is_file() and (record is None or record["kind"] != "adapter"):
        return load_pretrained(path, task=task)
    from deltaw.adapters import load_adapter

    origin = base or (record or {}).get("base") or _peft_base(folder)
    if not origin:
        raise CheckpointError(f"adapter {folder} does not say which base model it belongs to; give it with base=")
    labels = (record or {}).get("label_names") or []
    overrides: dict[str, Any] = (
        {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {n: i for i, n in enumerate(labels)},
        }
        if labels
        else {}
    )
    seed = (record or {}).get("options", {}).get("seed", 0)
    net = load_pretrained(origin, task=task, seed=seed, pooling=(record or {}).get("pooling"), **overrides)
    load_adapter(net, folder)
    return net.eval()


def _peft_base(folder: Path) -> str | None:
    file = folder / "adapter_config.json"
    return read_json(file).get("base_model_name_or_path") if file.is_file() else None
