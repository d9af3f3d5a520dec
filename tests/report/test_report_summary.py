"""The words of the summary follow the numbers: best, ties, losses, ceilings, trade-offs and doubts."""

from __future__ import annotations

import numpy as np

from deltaw.report import Results, summarise
from deltaw.report import summary as s
from deltaw.report.tables import accuracy_table, compress_table, gain_table

N = 600


def _scores(right: int, shift: int = 0) -> list[int]:
    """`right` correct of N; two lists with equal shift differ in as few examples as possible."""
    return np.roll((np.arange(N) < right).astype(int), shift).tolist()


def _results(scores: dict[str, list[int]], stage: str = "adapt", extra: list[dict] | None = None) -> Results:
    rows = [
        {"stage": stage, "method": m, "domain": "nyt", "metric": "accuracy", "value": sum(v) / N, "seed": 0}
        for m, v in scores.items()
    ]
    return Results(rows + (extra or []), {(stage, m, "nyt"): v for m, v in scores.items()})


def _row(method: str, metric: str, value: float, stage: str = "adapt", **more) -> dict:
    return {"stage": stage, "method": method, "domain": "all", "metric": metric, "value": value, "seed": 0, **more}


def test_a_clear_winner():
    r = _results({"linear-probe": _scores(480), "lora": _scores(520), "hra": _scores(495)})
    text = " ".join(s.adapt(r))
    assert "`lora` is the best of two adapted models: 86.7 % on nyt, +6.7 points against the linear probe." in text
    assert "a gain that holds" in text
    assert "No other method ties with it." in text
    assert "All two beat" not in text
    assert "Both beat the linear probe" in text


def test_a_tie_is_said_to_be_one():
    r = _results({"linear-probe": _scores(480), "lora": _scores(500), "hra": _scores(500, shift=30)},
                 extra=[_row("lora", "trainable_params", 1e6), _row("hra", "trainable_params", 1e5)])  # fmt: skip
    text = " ".join(s.adapt(r))
    assert "`hra` ties with it" in text
    assert "Of these `hra` is the cheapest, with 100 k trained parameters, 10 % of those of `lora`" in text


def test_a_loss_and_a_tie_with_the_probe_are_said():
    lost = " ".join(s.adapt(_results({"linear-probe": _scores(480), "lora": _scores(440)})))
    assert "a loss that holds" in lost
    assert "More than 2 points below the probe: `lora` on nyt (−6.7)." in lost
    tied = " ".join(s.adapt(_results({"linear-probe": _scores(480), "lora": _scores(481, shift=40)})))
    assert "so this is a tie with the probe" in tied
    assert "No method falls more than 2 points" in tied


def test_merge_against_the_ceiling():
    r = _results({"linear-probe": _scores(480), "single-task": _scores(520), "iso-c": _scores(510), "ties": _scores(470)},
                 stage="merge")  # fmt: skip
    text = " ".join(s.merge(r))
    assert "`iso-c` is the best of two merged models: 85.0 %" in text
    assert "at 86.7 %: −1.7 points" in text
    assert "keeps 98.1 % of their accuracy" in text


def test_compression_trade_off():
    extra = [_row(m, "size_bytes", b, "compress") for m, b in (("dense", 100.0), ("svd", 70.0), ("lord", 70.0))]
    extra += [_row(m, "latency_ms", v, "compress", batch=1) for m, v in (("dense", 2.0), ("svd", 2.5), ("lord", 2.5))]
    r = _results({"dense": _scores(510), "svd": _scores(430), "lord": _scores(505)}, "compress", extra)
    text = " ".join(s.compress(r))
    assert "`lord` keeps the most accuracy: 84.2 % of 85.0 % before compression, at 70 % of the bytes." in text
    assert "`svd` ends 12.5 points below it" in text
    assert "1.25 times (batch 1) the dense model's time: smaller is not faster here." in text
    marks = {row[0].text: [c.mark for c in row] for row in compress_table(r, "").rows}
    assert marks["lord"][1] == "best"
    assert marks["dense"][1] == ""
    assert marks["dense"][-1] == "best"


def test_inspect_words(run):
    r = Results(run["rows"], run["predictions"])
    text = " ".join(s.inspect(r, run["spectra"]))
    assert "none for `normuon`" in text
    assert "for `lora` to" in text
    without = " ".join(s.inspect(r, {}))
    assert "for `lora` to" in without, "the rows alone carry the inspection"


def test_doubts_follow_the_run(run):
    parts = {
        p.title: " ".join(p.sentences)
        for p in summarise(Results(run["rows"], run["predictions"]), {}, {"mode": "quick"})
    }
    assert "600 a domain" in parts["Doubts"]
    assert "One seed" in parts["Doubts"]
    assert "quick run" in parts["Doubts"]
    rows = [*run["rows"], *(dict(r, seed=1) for r in run["rows"])]
    assert "2 seeds are averaged" in " ".join(summarise(Results(rows), {}, {})[-1].sentences)
    wrong = [dict(r, value=0.5) if (r["method"], r["metric"]) == ("hra", "accuracy") else r for r in run["rows"]]
    assert "disagree for adapt/hra/tweets" in " ".join(
        summarise(Results(wrong, run["predictions"]), {}, {})[-1].sentences
    )


def test_seeds_are_averaged_and_given_intervals_kept():
    row = {"stage": "adapt", "method": "lora", "domain": "nyt", "metric": "accuracy", "value": 0.8, "seed": 0}
    assert Results([row, dict(row, value=0.9, seed=1)]).accuracy("adapt", "lora", "nyt").value == 0.8500000000000001
    i = Results([dict(row, low=0.7, high=0.85)]).accuracy("adapt", "lora", "mean")
    assert i.value == 0.8
    assert Results([dict(row, low=0.7, high=0.85)]).accuracy("adapt", "lora", "nyt").low == 0.7


def test_tables_mark_best_and_ties():
    r = _results(
        {"linear-probe": _scores(480), "lora": _scores(520), "hra": _scores(519, shift=9), "dora": _scores(485)}
    )
    table = accuracy_table(r, "adapt", "t")
    assert {row[0].text: row[1].mark for row in table.rows} == {
        "linear-probe": "",
        "lora": "best",
        "hra": "tie",
        "dora": "",
    }
    gains = gain_table(r, "adapt", "t")
    assert [row[0].text for row in gains.rows] == ["lora", "hra", "dora"]
    assert gains.rows[0][1].text == "+6.7"
    assert 0 < gains.rows[0][1].tint <= 1


def test_a_method_with_slashes_in_its_name():
    r = Results([{"stage": "inspect", "method": "base/lora", "domain": "nyt", "metric": "intruders", "value": 1, "seed": 0}],
                {"inspect/base/lora/nyt": [1, 0]})  # fmt: skip
    assert ("inspect", "base/lora", "nyt") in r.predictions
