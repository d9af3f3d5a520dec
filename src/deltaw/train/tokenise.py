"""Examples to token ids, with the prompt masked out of the loss where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaw.errors import DataError

IGNORE = -100


def tokenise(examples: Sequence[dict[str, Any]], tokenizer: Any, task: str, max_length: int) -> list[dict[str, Any]]:
    """Token ids, attention mask and labels of each example; padding is left to the collator.

    For language modelling the labels are the ids themselves (the model shifts them), with the prompt's positions
    set to -100 so that only the completion counts. A prompt that fills `max_length` leaves nothing to learn and
    raises DataError.
    """
    if task == "classification":
        ids = tokenizer([e["text"] for e in examples], truncation=True, max_length=max_length)["input_ids"]
        return [
            {"input_ids": x, "attention_mask": [1] * len(x)} | ({"labels": e["label"]} if "label" in e else {})
            for x, e in zip(ids, examples, strict=True)
        ]
    rows = []
    for i, e in enumerate(examples):
        if "text" in e:
            ids = tokenizer(e["text"], truncation=True, max_length=max_length)["input_ids"]
            labels = list(ids)
        else:
            prompt = tokenizer(e["prompt"])["input_ids"]
            completion = tokenizer(e["completion"], add_special_tokens=False)["input_ids"]
            if tokenizer.eos_token_id is not None:
                # Encoders of the BERT kind close the prompt with a separator; a completion continues it instead.
                prompt = prompt[:-1] if prompt and prompt[-1] == tokenizer.eos_token_id else prompt
                completion = [*completion, tokenizer.eos_token_id]
            ids = (prompt + completion)[:max_length]
            labels = ([IGNORE] * len(prompt) + completion)[:max_length]
            if all(v == IGNORE for v in labels):
                raise DataError(
                    f"example {i + 1}: its prompt has {len(prompt)} tokens, max_length is {max_length}: nothing of the completion is left"
                )
        if len(ids) < 2:
            raise DataError(f"example {i + 1} has {len(ids)} token(s); language modelling needs at least two")
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def collator(tokenizer: Any, task: str) -> Any:
    """The batch builder for `task`: pads ids, masks and (for language modelling) labels to the longest row."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if task == "classification":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE)


def batches(
    rows: Sequence[dict[str, Any]], tokenizer: Any, task: str, batch_size: int = 64
) -> list[tuple[list[int], Any]]:
    """(indices, padded batch) pairs, rows of like length together so that little is padded."""
    build = collator(tokenizer, task)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]["input_ids"]), i))
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [(c, build([rows[i] for i in c])) for c in chunks]
