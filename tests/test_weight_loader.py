"""WeightLoader: fusion of linears with the same input, memory accounting, and errors for missing or extra tensors."""

import json
import re
import shutil

import pytest
import torch
from conftest import naming, packed_checkpoint
from safetensors.torch import load_file, save_file

from gptq_belle import hf_model, load
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.linear import ConcatenatedLinear, DenseLinear, PackedLinear
from gptq_belle.engine.weight_loader import WeightLoader
from gptq_belle.errors import InputError

CPU = torch.device("cpu")
NAMES = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
SIZES = [128, 64, 64]
VARIANTS = [{"bits": 4}, {"bits": 8, "sym": False}, {"bits": 3}, {"bits": 4, "act_order": True, "sym": False},
            {"bits": 4, "group_size": -1}, {"bits": 4, "with_g_idx": False}]


def weights(path):
    return WeightLoader(CheckpointReader(path), CPU, torch.float32, "exact")


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_of_every_variant(tiny_model, tmp_path, variant):
    path, ids = packed_checkpoint(tiny_model, tmp_path / "packed", **variant), torch.randint(384, (2, 40))
    with torch.inference_mode():
        wanted = hf_model(path, device="cpu")(ids).logits
    assert relative(load(path, device="cpu", head_bits=16).logits(ids), wanted) < 2e-4


@pytest.mark.parametrize(("act_order", "kind"), [(False, PackedLinear), (True, ConcatenatedLinear)])
def test_query_key_and_value_are_one_product_where_their_groups_agree(tiny_llama, tmp_path, act_order, kind):
    path = packed_checkpoint(tiny_llama, tmp_path / "packed", act_order=act_order)
    x = torch.randn(3, 128)
    together = weights(path).linear(NAMES, 128, SIZES, False)
    assert type(together) is kind
    apart = [weights(path).linear([name], 128, [size], False) for name, size in zip(NAMES, SIZES, strict=True)]
    assert torch.equal(together(x), torch.cat([linear(x) for linear in apart], -1))


def unpack_one(source, path):
    """Replace the second of NAMES in the packed checkpoint `path` by the full-precision weight of `source`."""
    plain = load_file(source / "model.safetensors")
    tensors = {name: t for name, t in load_file(path / "model.safetensors").items() if not name.startswith(NAMES[1])}
    save_file(tensors | {f"{NAMES[1]}.weight": plain[f"{NAMES[1]}.weight"]}, path / "model.safetensors")


def repack_one(source, path):
    """Replace the first of NAMES in the packed checkpoint `path` by one with 8 bits."""
    other = load_file(packed_checkpoint(source, path.with_name("other"), bits=8) / "model.safetensors")
    own = {name: t for name, t in other.items() if name.startswith(NAMES[0])}
    save_file(load_file(path / "model.safetensors") | own, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {re.escape(NAMES[0]): {"bits": 8}}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("change", "kind"), [(None, PackedLinear), (unpack_one, ConcatenatedLinear),
                                              (repack_one, ConcatenatedLinear)])
def test_biases_of_a_stage_are_counted_once(tiny_llama, tmp_path, change, kind):
    path = packed_checkpoint(tiny_llama, tmp_path / "packed")
    if change is not None:
        change(tiny_llama, path)
    x, sizes, results = torch.randn(2, 128), [], []
    biases = {f"{name}.bias": torch.randn(size) for name, size in zip(NAMES, SIZES, strict=True)}
    for extra in ({}, biases):
        save_file(load_file(path / "model.safetensors") | extra, path / "model.safetensors")
        loader = weights(path)
        operator = loader.linear(NAMES, 128, SIZES, bool(extra))
        assert type(operator) is kind
        sizes.append(loader.nbytes)
        results.append(operator(x))
    assert sizes[1] - sizes[0] == sum(bias.nbytes for bias in biases.values())
    torch.testing.assert_close(results[1] - results[0], torch.cat(list(biases.values())).expand(2, -1))


def test_packed_and_unpacked_linears_side_by_side(tiny_llama, tmp_path):
    path = packed_checkpoint(tiny_llama, tmp_path / "packed")
    unpack_one(tiny_llama, path)
    found = weights(path).linear(NAMES, 128, SIZES, False)
    assert [type(part) for part in found.parts] == [PackedLinear, DenseLinear, PackedLinear]
    assert found(torch.randn(2, 128)).shape == (2, 256)


def test_stored_head_of_a_tied_model_is_used(tiny_bloom, tmp_path):
    path = shutil.copytree(tiny_bloom, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    before = load(path, device="cpu").logits(torch.tensor([[5, 6]]))
    for factor in (1, 2):
        head = tensors["transformer.word_embeddings.weight"] * factor
        save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors")
        torch.testing.assert_close(load(path, device="cpu").logits(torch.tensor([[5, 6]])), before * factor)


@pytest.mark.parametrize("drop", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.scales",
                                  "model.layers.1.mlp.up_proj.qweight"])
def test_missing_tensor_is_named(tiny_llama, tmp_path, drop):
    path = packed_checkpoint(tiny_llama, tmp_path / "packed")
    tensors = load_file(path / "model.safetensors")
    del tensors[drop]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(InputError, match=naming(drop)):
        load(path, device="cpu")


@pytest.mark.parametrize(("extra", "named"), [
    ({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}, ["model.layers.7.mlp.up_proj.weight"]),
    ({"model.norm.weight": torch.ones(64)}, ["model.norm.weight", (64,)]),
    ({"model.norm.weight": torch.ones(128).int()}, ["model.norm.weight", torch.int32])])
def test_tensor_that_does_not_fit_is_named(tiny_llama, tmp_path, extra, named):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    save_file(load_file(path / "model.safetensors") | extra, path / "model.safetensors")
    with pytest.raises(InputError, match=naming(*named)):
        load(path, device="cpu")


def test_packed_weights_without_a_configuration_are_refused(tiny_llama, tmp_path):
    path = packed_checkpoint(tiny_llama, tmp_path / "packed")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "quantize_config.json").unlink()
    with pytest.raises(InputError, match=naming(path)):
        load(path, device="cpu")
