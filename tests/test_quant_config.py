"""QuantConfig: validation, the dictionary written to config.json, aliases, and presets."""

from dataclasses import replace

import pytest
from conftest import naming

from gptq_belle.errors import UsageError
from gptq_belle.formats.quantize_config import written_by_gptq_belle
from gptq_belle.quantization.config import DISABLED_VALUES, PRESETS, Override, QuantConfig, Techniques


@pytest.mark.parametrize(("setting", "value"), [
    ("bits", 5), ("bits", True), ("group_size", 0), ("group_size", 48), ("method", "awq"), ("damp", 0), ("damp", 1.5)])
def test_invalid_value_is_refused(setting, value):
    with pytest.raises(UsageError, match=str(value)) as caught:
        QuantConfig(**{setting: value})
    assert caught.value.exit_code == 2
    assert "Choose" in caught.value.remedy


def test_symmetric_is_written_as_v1_and_asymmetric_as_v2():
    symmetric, asymmetric = QuantConfig().to_dict(), QuantConfig(sym=False).to_dict()
    assert (symmetric["format"], symmetric["checkpoint_format"]) == ("gptq", "gptq")
    assert (asymmetric["format"], asymmetric["checkpoint_format"]) == ("gptq_v2", "gptq_v2")


def test_dictionary_has_the_keys_of_other_readers():
    stated = QuantConfig(bits=8, group_size=64, act_order=True).to_dict()
    needed = {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": True, "sym": True,
              "pack_dtype": "int32", "lm_head": False}
    assert needed.items() <= stated.items()
    assert written_by_gptq_belle(stated)
    assert not written_by_gptq_belle({"meta": {"quantizer": ["gptqmodel:7.0"]}})
    assert not written_by_gptq_belle({"meta": "gptq_belle:0.1.0"})


def test_names_of_the_file_format_are_accepted_as_aliases():
    config = QuantConfig(desc_act=True, damp_percent=0.05)
    assert config == QuantConfig(act_order=True, damp=0.05)
    assert (config.desc_act, config.damp_percent) == (True, 0.05)
    assert config.to_dict() == QuantConfig(act_order=True, damp=0.05).to_dict()
    assert replace(config, bits=8, act_order=False).desc_act is False
    assert QuantConfig(act_order=True, desc_act=True).act_order


@pytest.mark.parametrize("settings", [
    {"act_order": False, "desc_act": True}, {"act_order": True, "desc_act": False},
    {"damp": 0.01, "damp_percent": 0.1}])
def test_alias_that_contradicts_its_setting_is_refused(settings):
    with pytest.raises(UsageError):
        QuantConfig(**settings)


def test_fast_is_plain_gptq_and_best_the_default():
    assert QuantConfig(preset="fast").techniques == Techniques()
    assert QuantConfig().techniques == PRESETS["best"]


def test_best_without_all_techniques_is_fast():
    assert PRESETS["best"].disable(DISABLED_VALUES) == PRESETS["fast"]


@pytest.mark.parametrize("name", DISABLED_VALUES)
def test_each_technique_of_max_can_be_disabled_alone(name):
    left = PRESETS["max"].disable([name])
    assert left != PRESETS["max"]
    assert replace(left, **{key: getattr(PRESETS["max"], key) for key in DISABLED_VALUES[name]}) == PRESETS["max"]


def test_fast_is_max_without_all_techniques():
    assert PRESETS["max"].disable(DISABLED_VALUES) == PRESETS["fast"]


def test_targets_move_the_whole_way_with_few_bits():
    config = QuantConfig(overrides=(Override("a", bits=2), Override("b", bits=8)))
    assert [config.for_linear(name).techniques.alpha for name in "abc"] == [1.0, 0.5, 0.5]
    assert QuantConfig(bits=3, without=("targets",)).techniques.alpha == 0


def test_rounding_to_nearest_uses_no_techniques():
    assert QuantConfig(method="rtn").techniques == Techniques()


@pytest.mark.parametrize(("option", "value"), [("preset", "better"), ("without", ("clipping",))])
def test_unknown_preset_or_technique_is_refused(option, value):
    with pytest.raises(UsageError, match=naming(option, value if isinstance(value, str) else value[0])):
        QuantConfig(**{option: value})
