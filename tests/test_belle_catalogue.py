"""BELLE catalogue: names and hub ids, configurations, and sizes compared with written files."""

import json

import pytest

from gptq_belle.checkpoint.reader import CheckpointReader, read_config
from gptq_belle.cli import models
from gptq_belle.models import belle_catalogue
from gptq_belle.models.dimensions import dimensions
from gptq_belle.models.sizes import file_bytes
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint

NAMES = ["BELLE-7B-0.2M", "BELLE-7B-0.6M", "BELLE-7B-1M", "BELLE-7B-2M", "BELLE-7B-gptq", "BELLE-LLaMA-7B-0.6M-enc",
         "BELLE-LLaMA-7B-2M-enc", "BELLE-LLaMA-7B-2M-gptq-enc", "BELLE-LLaMA-13B-2M-enc"]


def test_models_are_found_by_name_in_any_case_and_by_hub_id():
    assert [each.name for each in belle_catalogue.BELLE_MODELS] == NAMES
    for name in NAMES:
        assert belle_catalogue.find_belle_model(name).hub_id == f"BelleGroup/{name}"
        known = belle_catalogue.find_belle_model(name)
        assert belle_catalogue.find_belle_model(name.upper()) is known
        assert belle_catalogue.find_belle_model(f"BelleGroup/{name}") is known
    assert belle_catalogue.find_belle_model("BELLE-7B") is None


def test_configurations_have_the_published_sizes():
    rows = {row["name"]: row for row in models.catalogue()}
    bloom, llama, large = rows["BELLE-7B-2M"], rows["BELLE-LLaMA-7B-2M-enc"], rows["BELLE-LLaMA-13B-2M-enc"]
    assert (bloom["billions"], llama["billions"], large["billions"]) == (7.07, 6.74, 13.02)  # as their authors count
    assert (bloom["gb_4_bit"], bloom["gb_8_bit"]) == (5.2, 8.2)
    assert (bloom["prompt_style"], llama["prompt_style"]) == ("bloom", "llama")


@pytest.mark.parametrize("bits", [4, 8])
def test_computed_sizes_equal_written_files(tiny_model, tmp_path, bits):
    quantize_checkpoint(tiny_model, tmp_path / "out", QuantConfig(bits=bits, method="rtn"))
    reader = CheckpointReader(tmp_path / "out")
    d = dimensions(json.loads((tiny_model / "config.json").read_text()))
    assert file_bytes(d, bits) == sum(reader.nbytes(name) for name in reader)


def test_plan_of_a_catalogue_model_needs_no_download():
    assert read_config("BELLE-LLaMA-13B-2M-enc") == belle_catalogue.CONFIGS["llama-13b"]
