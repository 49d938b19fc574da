"""Recipes as a benchmark: the command is run, and its journal's last epoch is told."""

from pathlib import Path

import pytest

from benchmarks import recipes
from benchmarks.recipes import RecipeOptions
from pipelines.errors import UserError
from trainer.recipes import RECIPES


def test_quick_trains_the_first(small_set):
    record = recipes.main(RecipeOptions(data=str(small_set), quick=True))
    cells = {(figure.row, figure.column): figure.samples for figure in record.figures}
    first = next(iter(RECIPES))
    assert set(cells) == {(first, column) for column in (recipes.ERROR, recipes.F1, recipes.WALL)}
    (error,) = cells[first, recipes.ERROR]
    assert 23 * error == pytest.approx(round(23 * error), abs=1e-4)  # of 23 images
    assert f"`onewarp train --data {small_set.name} --subset 0.25" in record.markdown()


def test_one_that_is_none_is_told():
    with pytest.raises(UserError, match="--only lok: there is no such recipe; there are look, default"):
        recipes.main(RecipeOptions(only=("lok",)))


def test_the_page_has_every_recipe():
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text().splitlines()
    table = [line for line in page if line.startswith("| ")][1:]
    assert table == [f"| {recipe.wish} | `{recipe.command('DIR')}` |" for recipe in RECIPES.values()]
