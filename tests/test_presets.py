"""Presets, and ideas switched off."""

from dataclasses import replace

import pytest
from conftest import naming

from gptq_belle.errors import UsageError
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.presets import DISABLED, PRESETS, Techniques, techniques_of


def test_fast_is_plain_gptq_and_best_the_default():
    assert QuantConfig(preset="fast").techniques == Techniques()
    assert QuantConfig().techniques == PRESETS["best"]


def test_without_all_ideas_best_is_fast():
    assert techniques_of("best", DISABLED) == techniques_of("fast")


@pytest.mark.parametrize("idea", DISABLED)
def test_every_idea_is_one_of_max_and_goes_alone(idea):
    left = techniques_of("max", [idea])
    assert left != PRESETS["max"]
    assert replace(left, **{name: getattr(PRESETS["max"], name) for name in DISABLED[idea]}) == PRESETS["max"]


def test_best_is_max_without_tuning():
    assert techniques_of("max", ["tuning"]) == PRESETS["best"]


def test_rounding_to_nearest_knows_no_ideas():
    assert QuantConfig(method="rtn").techniques == Techniques()


@pytest.mark.parametrize(("option", "value"), [("preset", "better"), ("without", ("clipping",))])
def test_other_names_are_refused(option, value):
    with pytest.raises(UsageError, match=naming(option, value if isinstance(value, str) else value[0])):
        QuantConfig(**{option: value})
