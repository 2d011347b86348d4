"""inspect: its results for valid directories, and the problems that it names for damaged ones."""

import json
import shutil

import pytest
import torch
from conftest import VOCABULARY, naming, packed_checkpoint
from safetensors.torch import load_file, save_file

from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.errors import InputError


def edited(path, change):
    """Rewrite the weights of a copied directory through change(tensors)."""
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def first(tensors, suffix):
    return next(name for name in sorted(tensors) if name.endswith(suffix))


@pytest.fixture
def packed(tiny_model, tmp_path):
    return packed_checkpoint(tiny_model, tmp_path / "packed", bits=4, group_size=32)


def test_full_precision_model(tiny_model):
    found = inspect(tiny_model)
    tensors = load_file(tiny_model / "model.safetensors")
    assert found.problems == []
    assert found.quantization is None
    assert found.act_order is None
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert sum(part.bytes for part in found.parts.values()) == sum(tensor.nbytes for tensor in tensors.values())
    assert (found.blocks, found.hidden_size, found.vocabulary) == (2, 128, VOCABULARY)
    assert found.prompt_style == found.architecture
    assert found.tied == ("head" not in found.parts) == (found.architecture == "bloom")
    assert found.context == 256


def test_int64_group_index_is_read(tiny_llama, tmp_path):
    path = packed_checkpoint(tiny_llama, tmp_path / "packed", act_order=True)
    tensors = load_file(path / "model.safetensors")
    save_file({name: tensor.long() if name.endswith("g_idx") else tensor for name, tensor in tensors.items()},
              path / "model.safetensors")
    assert inspect(path).act_order is True


@pytest.mark.parametrize(("bits", "sym", "act_order"), [(4, True, False), (3, False, True), (8, True, True)])
def test_packed_model(tiny_model, tmp_path, bits, sym, act_order):
    path = packed_checkpoint(tiny_model, tmp_path / "packed", bits=bits, sym=sym, act_order=act_order)
    found = inspect(path)
    assert found.problems == []
    assert found.parameters == inspect(tiny_model).parameters
    assert (found.quantization.bits, found.quantization.sym) == (bits, sym)
    assert found.act_order == act_order
    assert found.quantization.producer.startswith("gptq_belle:")
    words = load_file(path / "model.safetensors")
    assert found.parts["packed weights"].bytes == sum(t.nbytes for n, t in words.items() if n.endswith("qweight"))
    assert "unpacked linears" not in found.parts


def damage_extra(tensors):
    tensors["transformer.h.0.extra.weight"] = torch.zeros(2)


def damage_words(tensors):
    del tensors[first(tensors, ".qweight")]


def damage_missing(tensors):
    del tensors[first(tensors, "layernorm.weight")]


def damage_scales(tensors):
    tensors[first(tensors, ".scales")][0, 0] = torch.nan


def damage_order(tensors):
    tensors[first(tensors, ".g_idx")][0] = 99


def damage_zeros(tensors):
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name].fill_(0x88888888 - (1 << 32))


def damage_shape(tensors):
    name = first(tensors, ".qweight")
    tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_missing, ["layernorm.weight"]),
        (damage_extra, ["transformer.h.0.extra.weight"]),
        (damage_words, ["qweight"]),
        (damage_scales, ["scales", "NaN"]),
        (damage_order, ["g_idx"]),
        (damage_zeros, ["gptq_v2"]),
        (damage_shape, ["4 bits"]),
    ],
)
def test_damage_is_named(packed, damage, named):
    edited(packed, damage)
    assert any(all(name in text for name in named) for text in inspect(packed).problems)


def test_long_list_of_problems_is_shortened(packed):
    edited(packed, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("norm.weight")])
    edited(packed, damage_zeros)
    problems = inspect(packed).problems
    assert len(problems) <= 12


@pytest.mark.parametrize(("key", "value", "problem"), [("bits", 5, "bits 5"), ("quant_method", "eetq", "'eetq'")])
def test_unsupported_configuration_is_a_problem(packed, key, value, problem):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"][key] = value
    (packed / "config.json").write_text(json.dumps(config))
    assert any(problem in text for text in inspect(packed).problems)


def test_packed_weights_without_configuration_and_the_reverse_are_problems(packed, tiny_model, tmp_path):
    config = json.loads((packed / "config.json").read_text())
    settings = config.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "quantize_config.json").unlink()
    assert inspect(packed).problems
    shutil.copytree(tiny_model, tmp_path / "plain")
    (tmp_path / "plain" / "quantize_config.json").write_text(json.dumps(settings))
    assert inspect(tmp_path / "plain").problems


def test_missing_tokenizer_is_a_problem(packed):
    for file in packed.glob("tokenizer*"):
        file.unlink()
    assert any("tokenizer" in text for text in inspect(packed).problems)


def test_empty_directory_is_rejected(tmp_path):
    with pytest.raises(InputError, match=naming(tmp_path / "config.json")):
        inspect(tmp_path)
