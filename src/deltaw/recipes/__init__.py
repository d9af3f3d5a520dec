"""Pipelines: recipes in YAML and the runner that takes a model through adapt, merge, compress, inspect and report."""

from deltaw.recipes.cells import Cell
from deltaw.recipes.run import RunResult, run
from deltaw.recipes.schema import Recipe, builtin_recipes, load_recipe

__all__ = ["Cell", "Recipe", "RunResult", "builtin_recipes", "load_recipe", "run"]
