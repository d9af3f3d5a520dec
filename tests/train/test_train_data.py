"""Reading data: formats, inference of columns and labels, splits, and every complaint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.errors import DataError, OptionError, UnknownNameError
from deltaw.train import load_data, tokenise

ROWS = [{"text": f"sentence {i}", "label": i % 2} for i in range(20)]


def write_csv(path: Path, rows: list[dict], columns: list[str] | None = None) -> Path:
    columns = columns or list(rows[0])
    lines = [",".join(columns)] + [",".join("" if r[c] is None else str(r[c]) for c in columns) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, ending: str):
    path = tmp_path / f"data.{ending}"
    if ending == "csv":
        write_csv(path, ROWS)
    elif ending == "tsv":
        path.write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in ROWS))
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    elif ending == "json":
        path.write_text(json.dumps(ROWS))
    else:
        import datasets

        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    found = load_data(path, validation_fraction=0.0)
    assert found.train == ROWS
    assert found.task == "classification"
    assert found.label_names == ["0", "1"]


def test_folder_with_splits_and_named_columns(tmp_path: Path):
    rows = [{"Review": f"r{i}", "mood": "bad" if i % 3 else "good"} for i in range(9)]
    for split in ("train", "valid", "test"):
        write_csv(tmp_path / f"{split}.csv", rows)
    found = load_data(tmp_path, label_column="mood", labels=["bad", "good"])
    assert found.columns == {"text": "Review", "label": "mood"}
    assert (len(found.train), len(found.validation), len(found.test)) == (9, 9, 9)
    assert [e["label"] for e in found.train[:3]] == [1, 0, 0]
    mapped = load_data(tmp_path, label_column="mood", labels={"good": "positive", "bad": "negative"})
    assert mapped.label_names == ["positive", "negative"]
    assert [e["label"] for e in mapped.train[:3]] == [0, 1, 1]


def test_validation_is_held_out_once_and_disjoint():
    found = load_data({"train": ROWS}, validation_fraction=0.25, seed=3)
    again = load_data({"train": ROWS}, validation_fraction=0.25, seed=3)
    assert found == again
    assert len(found.validation) == 5
    assert not {e["text"] for e in found.train} & {e["text"] for e in found.validation}
    assert load_data({"train": ROWS}, validation_fraction=0.25, seed=4).validation != found.validation


def test_numeric_labels_keep_their_order_and_floats_are_classes_when_whole():
    rows = [{"text": "a", "label": float(v)} for v in (10, 2, 2, 10)]
    assert load_data({"train": rows}, validation_fraction=0.0).label_names == ["2", "10"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": None, "label": 1}, {"text": "b", "label": 0}], {}, r"row 1: text in column 'text' is missing"),
        ([{"text": "a", "label": 1}, {"text": "  ", "label": 0}], {}, r"row 2: text in column 'text' is empty"),
        ([{"text": 3, "label": 1}, {"text": "b", "label": 0}], {}, "of type int"),
        ([{"text": "a", "label": float("nan")}, {"text": "b", "label": 0}], {}, r"row 1: label .* missing \(NaN"),
        ([{"text": "a", "label": 0.37}, {"text": "b", "label": 0}], {}, "regression targets are not supported"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], {}, "one class only"),
        (ROWS, {"label_column": "labell"}, "did you mean 'label'"),
        (ROWS, {"labels": {"0": "no", "2": "yes"}}, "label '1'.*not among the known labels"),
        ([{"body": "a", "label": 1}], {}, "Name it with --text-column"),
        ([{"text": "a"}], {"task": "classification"}, "no label column"),
        ([], {}, "no training rows"),
    ],
)
def test_bad_data_is_named(rows: list[dict], options: dict, message: str):
    with pytest.raises(DataError, match=message):
        load_data({"train": rows}, validation_fraction=0.0, **options)


def test_a_validation_label_that_training_lacks_is_refused():
    with pytest.raises(DataError, match=r"validation: label '2' \(1 rows\)"):
        load_data({"train": ROWS, "validation": [{"text": "x", "label": 2}]})


def test_bad_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        load_data(tmp_path / "none.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError, match="is empty"):
        load_data(tmp_path / "empty.csv")
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": 1}\n{"text": ')
    with pytest.raises(DataError, match="cannot be read as json"):
        load_data(tmp_path / "broken.jsonl")
    (tmp_path / "data.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"ending '\.xlsx'"):
        load_data(tmp_path / "data.xlsx")
    with pytest.raises(DataError, match="no train/validation/test file"):
        load_data(tmp_path / "..").train  # noqa: B018
    with pytest.raises(UnknownNameError, match="unknown demo domain 'tweet'"):
        load_data("demo:tweet")
    with pytest.raises(OptionError, match="validation_fraction"):
        load_data({"train": ROWS}, validation_fraction=1.5)


class Words:
    """A tokenizer of one id per word, with an end token."""

    eos_token_id = 1
    pad_token_id = 0

    def __call__(self, text, add_special_tokens=True, truncation=False, max_length=None, **_):
        def ids(t: str) -> list[int]:
            return [len(w) + 10 for w in t.split()][:max_length]

        return {"input_ids": [ids(t) for t in text] if isinstance(text, list) else ids(text)}


def test_prompts_are_masked_out_of_the_loss():
    rows = tokenise([{"prompt": "what is two", "completion": "a number"}], Words(), "causal-lm", 16)
    assert rows[0]["input_ids"] == [14, 12, 13, 11, 16, 1]
    assert rows[0]["labels"] == [-100, -100, -100, 11, 16, 1]
    with pytest.raises(DataError, match="nothing of the completion is left"):
        tokenise([{"prompt": "a b c d", "completion": "e"}], Words(), "causal-lm", 4)


def test_prompt_and_completion_columns_are_inferred():
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)]
    found = load_data({"train": rows})
    assert found.task == "causal-lm"
    assert found.columns == {"prompt": "question", "completion": "answer"}


def test_a_named_column_decides_over_usual_names():
    rows = [{"question": f"q{i}", "answer": f"a{i}", "text": f"t{i}", "label": i % 2} for i in range(8)]
    pairs = load_data({"train": rows})
    assert pairs.task == "causal-lm"
    assert pairs.columns == {"prompt": "question", "completion": "answer"}
    for asked in ({"label_column": "label"}, {"task": "classification"}, {"text_column": "text"}):
        assert load_data({"train": rows}, **asked).columns == {"text": "text", "label": "label"}
    with pytest.raises(DataError, match="--completion-column"):
        load_data({"train": [{"prompt": "p", "reply": "r"}] * 4}, prompt_column="prompt")
    with pytest.raises(OptionError, match="limit"):
        load_data({"train": rows}, limit=0)


def test_the_label_map_is_kept():
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(8)]
    data = load_data({"train": rows}, labels={"1": "good", "0": "bad"}, validation_fraction=0.0)
    assert data.label_names == ["good", "bad"]
    assert data.label_map == {"1": "good", "0": "bad"}
    assert [e["label"] for e in data.train[:2]] == [1, 0]
