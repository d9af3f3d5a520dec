"""Every recorded table is what its script makes of the recorded figures: nothing was typed by hand."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECORDS = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda p: p.stem)
def test_markdown_is_rebuilt_from_the_json(record: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    script = importlib.import_module(record.stem)
    result = json.loads(record.read_text(encoding="utf-8"))
    assert script.render(result) == record.with_suffix(".md").read_text(encoding="utf-8")
    assert result["machine"]["commit"]
    assert "seed" in result


def test_every_table_has_its_record():
    assert {p.stem for p in (BENCHMARKS / "results").glob("*.md")} == {p.stem for p in RECORDS}
    assert RECORDS
