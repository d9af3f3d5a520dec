"""The report as files: what they hold, that they are whole, equal for equal input, and safe with hostile text."""

from __future__ import annotations

import copy
import json
import os
import re
from html.parser import HTMLParser

import pytest

from deltaw.errors import DataError, DeltawError, NonFiniteError, UnknownNameError
from deltaw.report import Results, build_report
from deltaw.report import format as f
from deltaw.report.statistics import Interval

VOID = {"meta", "link", "input", "br", "img", "hr"}


class _Outline(HTMLParser):
    """Ids, headings, links to anchors and the balance of tags."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.levels: list[int] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.levels += [int(tag[1])] if re.fullmatch(r"h[1-6]", tag) else []
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        if dict(attrs).get("id"):
            self.ids.append(dict(attrs)["id"])

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag


def test_json_is_exactly_the_rows(report, run):
    assert json.loads((report.parent / "results.json").read_text(encoding="utf-8")) == run["rows"]


def test_only_the_three_files_are_left(report):
    assert sorted(p.name for p in report.parent.iterdir()) == ["report.html", "results.json", "results.md"]


def test_html_is_whole_and_self_contained(report):
    text = report.read_text(encoding="utf-8")
    page = _Outline(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)), "an id stands twice"
    assert page.outside == []
    assert "http://www.w3.org" in text  # the namespace of SVG is a name, not an address
    assert not re.findall(r"https?://(?!www\.w3\.org/)", text)
    assert page.levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(page.levels, page.levels[1:], strict=False)), "a level of headings is skipped"
    for anchor in re.findall(r'(?:href="|url\()#([^")]+)', text):
        assert anchor in page.ids
    assert len(text) < 1_500_000


def test_figures_are_there_with_a_text_and_without_raw_colours(report):
    text = report.read_text(encoding="utf-8")
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(svgs) == 2 * 10
    for svg in svgs:
        assert 'role="img"' in svg
        assert re.search(r'aria-label="[^"]{40,}"', svg)
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", svg), "a colour that does not follow the theme"
        assert "DejaVu" not in svg


def test_equal_input_gives_equal_bytes(report, run, tmp_path):
    again = build_report(tmp_path, **copy.deepcopy(run))
    for name in ("report.html", "results.md", "results.json"):
        assert (again.parent / name).read_bytes() == (report.parent / name).read_bytes()


def test_hostile_text_stays_text(run, tmp_path):
    evil = "<script>alert(1)</script>\"'`$x_{$ | </svg>"
    rows = [dict(r, method=evil if r["method"] == "lora" else r["method"]) for r in run["rows"]]
    predictions = {tuple((evil if p == "lora" else p) for p in k.split("/")): v for k, v in run["predictions"].items()}
    spectra = {(evil if m == "lora" else m): {evil: v} for m, d in run["spectra"].items() for v in [d["nyt"]]}
    meta = {"recipe": evil, "command": evil, "versions": {evil: evil}, "model": evil, "methods": {evil: {"summary": evil}},
            "adapt_options": {evil: {evil: evil}}, "timings": {evil: 1.0}}  # fmt: skip
    text = build_report(tmp_path, rows, meta=meta, predictions=predictions, spectra=spectra, title=evil).read_text()
    assert "<script>alert" not in text
    assert text.count("<script>") == text.count("</script>") == 1
    assert _Outline(text).open == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


@pytest.mark.parametrize("kept", [(), ("merge",), ("compress", "inspect")])
def test_missing_stages_are_said_to_be_missing(run, tmp_path, kept):
    rows = [r for r in run["rows"] if r["stage"] in kept]
    predictions = {k: v for k, v in run["predictions"].items() if k.split("/")[0] in kept}
    spectra = run["spectra"] if "inspect" in kept else {}
    path = build_report(tmp_path, rows, meta={}, predictions=predictions, spectra=spectra)
    text = path.read_text(encoding="utf-8")
    for stage in ("adapt", "merge", "compress", "inspect"):
        assert (f"no results for the stage {stage}," in text) == (stage not in kept)
    assert _Outline(text).open == []
    assert json.loads((tmp_path / "results.json").read_text()) == rows


def test_rows_alone_are_enough(run, tmp_path):
    text = build_report(tmp_path, [r for r in run["rows"] if r["domain"] in ("nyt", "all")]).read_text(encoding="utf-8")
    assert "No predictions were handed over" in text
    assert "ΔW by method and domain" in text


def test_markdown_tables_have_equal_columns(report):
    text = (report.parent / "results.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M)
    assert len(blocks) == 8
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert "deltaw run sentiment" in text
    assert "Chosen by the run: scale 0.3." in text
    assert "at 60 % of the parameters in linear layers, 81 % of the parameters and 81 % of the bytes" in text


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"value": float("nan")}, NonFiniteError, r"row 3 \(adapt/.*value is nan"),
        ({"stage": "adopt"}, UnknownNameError, "did you mean 'adapt'"),
        ({"value": "0.9"}, DataError, "row 3: value is '0.9'"),
        ({"value": True}, DataError, "expected a number"),
        ({"metric": None}, DataError, "row 3: metric"),
    ],
)
def test_bad_rows_are_named_and_nothing_is_written(run, tmp_path, change, error, said):
    rows = [dict(r) for r in run["rows"]]
    rows[3].update(change)
    with pytest.raises(error, match=said):
        build_report(tmp_path / "out", rows)
    assert not (tmp_path / "out").exists()


def test_a_missing_key_is_named():
    with pytest.raises(DataError, match="row 0 has no 'seed'; found keys"):
        Results([{"stage": "adapt", "method": "lora", "domain": "nyt", "metric": "accuracy", "value": 0.5}])


def test_bad_predictions_and_spectra_are_named(run, tmp_path):
    with pytest.raises(DataError, match=r"adapt/b/nyt hold 3 examples, those of adapt/a/nyt 2"):
        Results([], {"adapt/a/nyt": [1, 0], "adapt/b/nyt": [1, 0, 1]})
    with pytest.raises(DataError, match="0 and 1"):
        Results([], {"adapt/a/nyt": [1, 2]})
    with pytest.raises(DataError, match="stage/method/domain"):
        Results([], {"adapt": [1]})
    with pytest.raises(DataError, match="lora/nyt/w"):
        build_report(tmp_path, run["rows"], spectra={"lora": {"nyt": {"w": {"singular_values": []}}}})


def test_a_failing_disk_leaves_the_old_report(report, run, tmp_path, monkeypatch):
    for name in ("report.html", "results.md", "results.json"):
        (tmp_path / name).write_text("old")
    calls = []

    def full(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return len(os.fspath(self)) and original(self, *args, **kwargs)

    from pathlib import Path

    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DeltawError, match=r"No space left on device.*choose another folder"):
        build_report(tmp_path, [], meta={})
    monkeypatch.undo()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        ("report.html", "results.md", "results.json"), "old"
    )


def test_numbers_read_well():
    assert [f.count(x) for x in (770, 148_226, 10_646_786, 1.2e9)] == ["770", "148 k", "10.6 M", "1.2 B"]
    assert [f.signed(x) for x in (1.25, -0.44, 0.01, -0.01)] == ["+1.2", "−0.4", "0.0", "0.0"]
    assert [f.duration(x) for x in (0.42, 59.4, 59.7, 185, 7800)] == [
        "0.4 s",
        "59 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert f.bounds(Interval(-1, -2.1, -0.04), sign=True) == "−2.1 to −0.04"
    assert f.listing(["a", "b", "c"]) == "`a`, `b` and `c`"
    assert f.listing([]) == ""
    assert f.size(90_900_000) == "90.9 MB"
    assert f.count(999_999) == "1 M"
