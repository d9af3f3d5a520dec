"""A whole run on the embedded model and data: its rows, its report, a kill in the middle, and its refusals."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltaw.errors import OptionError, UnknownNameError
from deltaw.recipes import run

RECIPE = """\
name: small
model: all-minilm-l6-v2
threads: 1
data: {domains: [tweets, nyt], train: 24, validation: 8, test: 16, max_length: 24}
head: {init: probe, sentences: 24}
adapt:
  - {name: linear-probe, method: linear-probe}
  - {name: lora, method: lora, epochs: 1, options: {rank: 2}}
  - {name: adamw, method: full, parameters: matrices, lr: 1.0e-4, epochs: 1}
merge:
  models: adamw
  methods:
    - {method: linear}
    - {method: task-arithmetic, tune: {scale: [0.25, 0.5]}}
compress: {ratio: 0.6, calibration: 8, methods: [svd-llm], latency_batches: [1], latency_repeats: 2}
inspect: {models: [lora]}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    result = run(recipe, out)
    assert result.report == out / "report.html"
    assert result.reused == 0
    return out


def weights(out: Path) -> dict[str, str]:
    return {
        str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.rglob("*.safetensors"))
    }


def test_the_run_leaves_rows_of_every_stage_and_a_report(finished: Path):
    rows = json.loads((finished / "results.json").read_text())
    assert {r["stage"] for r in rows} == {"adapt", "merge", "compress", "inspect"}
    for r in rows:
        assert {"stage", "method", "domain", "metric", "value", "seed"} <= set(r)
    accuracy = {(r["stage"], r["method"], r["domain"]): r["value"] for r in rows if r["metric"] == "accuracy"}
    assert ("adapt", "linear-probe", "tweets") in accuracy
    assert accuracy["merge", "single-task", "nyt"] == accuracy["adapt", "adamw", "nyt"]
    params = {r["method"]: r["value"] for r in rows if r["stage"] == "compress" and r["metric"] == "linear_params"}
    assert params["svd-llm"] <= 0.6 * params["dense"]
    page = (finished / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (finished / "results.md").read_text().startswith("# ")


def test_a_second_call_only_reads(recipe: Path, finished: Path):
    before = weights(finished)
    page = (finished / "report.html").read_text()
    result = run(recipe, finished)
    assert result.reused > 0
    assert weights(finished) == before
    assert (finished / "report.html").read_text() == page


def test_a_killed_run_continues_to_the_same_weights(recipe: Path, finished: Path, tmp_path: Path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "deltaw", "run", str(recipe), "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    deadline = time.monotonic() + 240
    while not (out / "adapt" / "lora" / "tweets" / "cell.json").exists():
        assert time.monotonic() < deadline, "the run never reached its second method"
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "report.html").exists()
    result = run(recipe, out)
    assert result.reused > 0
    assert weights(out) == weights(finished)
    assert not list(out.rglob("*.partial"))


def test_other_options_are_refused_and_named(recipe: Path, finished: Path, tmp_path: Path):
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.replace("epochs: 1, options: {rank: 2}", "epochs: 2, options: {rank: 2}"))
    with pytest.raises(OptionError, match=r"adapt\[1\]\.epochs: 1\.0 there, 2\.0 now"):
        run(other, finished)
    with pytest.raises(UnknownNameError, match="resume"):
        run(recipe, finished, resume="sometimes")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(OptionError, match="is not a run of deltaw"):
        run(recipe, tmp_path / "full")
    assert (tmp_path / "full" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: lora", "method: lorra", "did you mean 'lora'"),
        ("options: {rank: 2}", "options: {rnk: 2}", "option of method 'lora'"),
        ("method: task-arithmetic, tune: {scale", "method: task-arithmetic, tune: {scal", "did you mean 'scale'"),
        ("methods: [svd-llm]", "methods: [svd-lm]", "did you mean 'svd-llm'"),
        ("domains: [tweets, nyt]", "domains: [tweets, nyc]", "did you mean 'nyt'"),
    ],
)
def test_unknown_names_stop_before_any_work(tmp_path: Path, old: str, new: str, message: str):
    assert old in RECIPE
    path = tmp_path / "bad.yaml"
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(UnknownNameError, match=message):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out" / "adapt").exists()
