"""Presets, and ideas switched off."""

from dataclasses import replace

import pytest

from gptq_belle.errors import UsageError
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.presets import IDEAS, RECIPES, Recipe, recipe


def test_fast_is_plain_gptq_and_best_the_default():
    assert QuantConfig(preset="fast").recipe == Recipe()
    assert QuantConfig().recipe == RECIPES["best"]


def test_without_all_ideas_best_is_fast():
    assert recipe("best", IDEAS) == recipe("fast")


@pytest.mark.parametrize("idea", IDEAS)
def test_every_idea_is_one_of_max_and_goes_alone(idea):
    left = recipe("max", [idea])
    assert left != RECIPES["max"]
    assert replace(left, **{name: getattr(RECIPES["max"], name) for name in IDEAS[idea]}) == RECIPES["max"]


def test_best_is_max_without_tuning():
    assert recipe("max", ["tuning"]) == RECIPES["best"]


def test_rounding_to_nearest_knows_no_ideas():
    assert QuantConfig(method="rtn").recipe == Recipe()


@pytest.mark.parametrize(("option", "value"), [("preset", "better"), ("without", ("clipping",))])
def test_other_names_are_refused(option, value):
    with pytest.raises(UsageError, match=f"{option} .* is not allowed"):
        QuantConfig(**{option: value})
