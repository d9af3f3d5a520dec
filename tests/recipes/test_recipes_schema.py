"""Recipes: what is built in is valid, and every mistake is named with its line and the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaw.errors import OptionError, UnknownNameError
from deltaw.recipes import builtin_recipes, load_recipe

GOOD = """\
name: mine
model: all-minilm-l6-v2
data: {domains: [tweets], train: 50, test: 20}
adapt:
  - {name: linear-probe, method: linear-probe}
  - name: tuned
    method: full
    epochs: 1
merge:
  models: tuned
  methods:
    - {method: linear}
quick:
  data: {train: 10}
"""


def check(tmp_path: Path, text: str, mode: str = "default"):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_recipe(path, mode)


@pytest.mark.parametrize("mode", ["default", "quick", "full"])
def test_builtin_recipes_are_valid(mode: str):
    for name in builtin_recipes():
        assert load_recipe(name, mode).name == name


def test_modes_and_seed_overlay(tmp_path: Path):
    assert check(tmp_path, GOOD).data.train == 50
    quick = check(tmp_path, GOOD, "quick")
    assert (quick.data.train, quick.data.test) == (10, 20)
    assert load_recipe(tmp_path / "mine.yaml", seed=7).seed == 7


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    epochs: 1", "    epohcs: 1", r"line 8: unknown key 'adapt\.1\.epohcs'; did you mean 'epochs'\?"),
        ("    epochs: 1", "    epochs: -1", r"line 8: adapt\.1\.epochs: .*greater than 0.*found -1"),
        ("train: 50", "train: many", r"line 3: data\.train: .*integer.*found 'many'"),
        ("model: all-minilm-l6-v2\n", "", r"key 'model' is missing"),
        ("  models: tuned", "  models: linear-probe", r"'linear-probe' is not the name of an adapted model"),
        ("    method: full", "    method: lora", r"trains no whole model"),
        ("name: tuned", "name: ../tuned", r"line 6: adapt\.1\.name"),
        ("    - {method: linear}", "    - {method: linear}\n    - {method: linear}", r"merge methods must differ"),
        ("  models: tuned", "  models: tunde", r"'tunde' is not the name of an adapted model"),
        ("domains: [tweets]", "domains: []", r"line 3: data\.domains"),
        ("quick:\n  data: {train: 10}", "quick:\n  data: {trian: 10}", None),
    ],
)
def test_mistakes_name_line_and_key(tmp_path: Path, old: str, new: str, message: str | None):
    assert old in GOOD
    text = GOOD.replace(old, new)
    if message is None:
        with pytest.raises(OptionError, match=r"line 14: unknown key 'data\.trian'; did you mean 'train'\?"):
            check(tmp_path, text, "quick")
    else:
        with pytest.raises(OptionError, match=message):
            check(tmp_path, text)


def test_not_yaml_and_unknown_names(tmp_path: Path):
    with pytest.raises(OptionError, match=r"line 2 is not YAML"):
        check(tmp_path, "name: [a\nmodel: }")
    with pytest.raises(OptionError, match="expected keys and values"):
        check(tmp_path, "- a\n- b\n")
    with pytest.raises(OptionError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9".encode("latin-1"))
    with pytest.raises(OptionError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    with pytest.raises(UnknownNameError, match="did you mean 'sentiment'"):
        load_recipe("sentimet")
