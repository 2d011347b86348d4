"""Settings: what is refused, and what stands in a checkpoint."""

from dataclasses import replace

import pytest

from gptq_belle.errors import UsageError
from gptq_belle.formats.quantize_config import written_by_gptq_belle
from gptq_belle.quantization.config import QuantConfig


@pytest.mark.parametrize(("setting", "value"), [
    ("bits", 5), ("bits", True), ("group_size", 0), ("group_size", 48), ("method", "awq"), ("damp", 0), ("damp", 1.5)])
def test_values_that_are_not_allowed_are_named_with_those_that_are(setting, value):
    with pytest.raises(UsageError, match=str(value)) as caught:
        QuantConfig(**{setting: value})
    assert caught.value.exit_code == 2
    assert "Choose" in caught.value.remedy


def test_symmetric_is_written_as_v1_and_asymmetric_as_v2():
    symmetric, asymmetric = QuantConfig().to_dict(), QuantConfig(sym=False).to_dict()
    assert (symmetric["format"], symmetric["checkpoint_format"]) == ("gptq", "gptq")
    assert (asymmetric["format"], asymmetric["checkpoint_format"]) == ("gptq_v2", "gptq_v2")


def test_the_dictionary_has_what_other_readers_need():
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
def test_an_alias_that_contradicts_its_setting_is_refused(settings):
    with pytest.raises(UsageError):
        QuantConfig(**settings)
