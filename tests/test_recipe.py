"""Recipes: filled in from methods, stable once filled in, written down and read back."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanda.commands.prune import flags_given
from wanda.errors import ConfigurationError
from wanda.methods import METHODS
from wanda.recipe import Recipe, parse_bytes


@pytest.mark.parametrize("variant", [False, True])
@pytest.mark.parametrize(("method", "pattern"), list(itertools.product(METHODS.names(), [None, "2:4"])))
def test_a_resolved_recipe_resolves_to_itself_and_survives_json(
    method: str, pattern: str | None, variant: bool
) -> None:
    if method == "owl" and pattern:
        with pytest.raises(ConfigurationError, match="cannot vary the pattern"):
            Recipe(method=method, pattern=pattern).resolved(text=False)
        return
    asked = Recipe(method=method, pattern=pattern, variant=variant)
    if asked.faults(text=False):
        assert variant  # refused with N:M, and with updates that have no row to count in
        return
    recipe = asked.resolved(text=False)
    assert recipe.faults(text=False) == [] and recipe.resolved(text=False) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_named_axes_go_before_the_methods() -> None:
    recipe = Recipe(method="sparsegpt", score="wanda", group="row").resolved(text=False)
    assert (recipe.score, recipe.group, recipe.update) == ("wanda", "row", METHODS.get("sparsegpt").update)
    assert Recipe(method="wanda", update="admm-iterative").resolved(text=False).score is None


def test_the_last_match_of_sparsity_of_counts() -> None:
    recipe = Recipe(sparsity_of=("*.q_proj=0.1", "model.layers.3.*=0.9"))
    assert recipe.sparsity_for("model.layers.3.self_attn.q_proj") == Fraction(9, 10)
    assert recipe.sparsity_for("model.layers.2.self_attn.q_proj") == Fraction(1, 10)
    assert recipe.sparsity_for("model.layers.2.self_attn.k_proj") is None


@pytest.mark.parametrize("field", ["propagate", "experts", "dtype"])
def test_a_choice_that_is_none_is_refused_with_near_names(field: str) -> None:
    (fault,) = Recipe(**{field: "rooted"}).faults(text=False)
    assert f"unknown --{field} 'rooted'" in fault


def test_flags_go_before_a_files_recipe() -> None:
    base = Recipe(method="sparsegpt", samples=64, sparsity=0.7, exclude=("*.q_proj",)).resolved(text=False)
    assert Recipe().over(base) == base
    assert Recipe(seed=3).over(base).seed == 3
    given = flags_given(["prune", "m", "--samples=128", "--recipe", "wanda.json", "--no-variant", "--sparsity", "0.5"])
    assert given == {"samples", "variant", "sparsity"}
    over = Recipe(sparsity=0.5).over(base, given)
    assert (over.samples, over.sparsity, over.method, over.exclude) == (128, 0.5, "sparsegpt", ("*.q_proj",))
    other = Recipe(method="ria").over(base).resolved(text=False)
    assert (other.score, other.group, other.update, other.sparsity) == ("ria", "layer", "none", 0.7)
    assert Recipe(method="wanda").over(base, {"method"}).resolved(text=False).score == "wanda"
    fixed = Recipe(pattern="2:4").over(base).resolved(text=False)
    assert (fixed.pattern, fixed.sparsity, fixed.update) == ("2:4", None, "obs")
    assert Recipe(sparsity=0.4).over(fixed).resolved(text=False).pattern is None


def test_other_choices_take_the_place_of_what_went_with_the_files() -> None:
    wanda, best = (Recipe(method=name).resolved(text=False) for name in ("wanda", "best"))
    for base, flags in (
        (wanda, {"update": "admm-relaxed"}),
        (best, {"update": "none", "score": "wanda"}),
        (best, {"propagate": "none"}),
        (Recipe(method="ria").resolved(text=False), {"variant": True}),
    ):
        over = Recipe(**flags).over(base, flags.keys())
        assert over.faults(text=False) == [] and over.resolved(text=False) == over.resolved(text=False).resolved(False)
    assert Recipe(update="pcg").over(wanda, {"update"}).resolved(text=False).score == "wanda"
    own = Recipe(method="wanda", score="ria").resolved(text=False)
    assert Recipe(update="pcg").over(own, {"update"}).resolved(text=False).score == "ria"
    shared = Recipe(method="best", inherit=0.7).resolved(text=False)
    assert Recipe(update="admm-iterative").over(shared, {"update"}).resolved(text=False).inherit == 0.7
    assert Recipe(update="admm").over(best, {"update", "inherit"}).inherit is None


def test_files_without_a_recipe_are_refused(tmp_path: Path) -> None:
    for text in ("{}", "no json", '{"recipe": {"colour": "red"}}'):
        (tmp_path / "wanda.json").write_text(text)
        with pytest.raises(ConfigurationError, match="recipe"):
            Recipe.from_file(tmp_path / "wanda.json")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Recipe.from_file(tmp_path / "missing.json")


@given(st.integers(1, 10**6), st.sampled_from([("", 1), ("kB", 10**3), (" MiB", 2**20), ("gb", 10**9), ("G", 10**9)]))
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{number}{unit[0]}") == number * unit[1]


@pytest.mark.parametrize("text", ["", "GB", "4 parsecs", "four", "inf", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)
