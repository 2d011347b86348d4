"""Presets, and techniques that are disabled."""

from dataclasses import replace

import pytest
from conftest import naming

from gptq_belle.errors import UsageError
from gptq_belle.quantization.config import DISABLED, PRESETS, QuantConfig, Techniques


def test_fast_is_plain_gptq_and_best_the_default():
    assert QuantConfig(preset="fast").techniques == Techniques()
    assert QuantConfig().techniques == PRESETS["best"]


def test_best_without_all_techniques_is_fast():
    assert PRESETS["best"].disable(DISABLED) == PRESETS["fast"]


@pytest.mark.parametrize("name", DISABLED)
def test_each_technique_of_max_can_be_disabled_alone(name):
    left = PRESETS["max"].disable([name])
    assert left != PRESETS["max"]
    assert replace(left, **{key: getattr(PRESETS["max"], key) for key in DISABLED[name]}) == PRESETS["max"]


def test_best_is_max_without_tuning():
    assert PRESETS["max"].disable(["tuning"]) == PRESETS["best"]


def test_rounding_to_nearest_uses_no_techniques():
    assert QuantConfig(method="rtn").techniques == Techniques()


@pytest.mark.parametrize(("option", "value"), [("preset", "better"), ("without", ("clipping",))])
def test_other_names_are_refused(option, value):
    with pytest.raises(UsageError, match=naming(option, value if isinstance(value, str) else value[0])):
        QuantConfig(**{option: value})
