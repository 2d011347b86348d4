"""Checkpoints of llm-compressor, AWQ and auto-round, and quantized lm_heads, from files that this test writes.

The packers below follow the formats' descriptions with NumPy. Real exports are in test_foreign_exports.py.
"""

import json

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, cut_short
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptq_belle import hf_model, load
from gptq_belle.checkpoint.conversion import convert
from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.errors import InputError, UsageError

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each nibble of a word, the lowest first
IDS = torch.randint(4, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def stream(codes, bits):
    """Codes (R, C) to int32 words (R, C * bits / 32): a little-endian stream of bits a row."""
    rows = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    words = np.packbits(rows.reshape(len(codes), -1), axis=1, bitorder="little").view("<i4")
    return torch.from_numpy(words.astype(np.int32))


def nibbles(codes):
    """Codes (R, N) of 4 bits to AWQ's words (R, N / 8)."""
    grouped = codes.reshape(len(codes), -1, 8).astype(np.uint32)
    words = sum(grouped[..., output] << np.uint32(4 * place) for place, output in enumerate(AWQ_NIBBLES))
    return torch.from_numpy(words.view(np.int32).copy())


RANDOM = np.random.default_rng(3)


def grid(weight, bits, group, sym):
    """Codes (N, K), scales (N, G) float16 and zeros (N, G) of random weights, and the weights that they stand for."""
    outputs, inputs = weight.shape
    groups = 1 if group == -1 else inputs // group
    codes = RANDOM.integers(0, 2**bits, (outputs, inputs))
    scales = (RANDOM.random((outputs, groups)) * 0.02 + 0.01) * 2.0 ** (4 - bits)
    scales = scales.astype(np.float16)
    zeros = np.full((outputs, groups), 2 ** (bits - 1)) if sym else RANDOM.integers(0, 2**bits, (outputs, groups))
    wide = [np.repeat(each.astype(np.float64), inputs // groups, 1) for each in (scales, zeros)]
    return codes, scales, zeros, torch.from_numpy(wide[0] * (codes - wide[1])).float()


def gptq_v2(codes, scales, zeros, bits, sym, offset=0):
    return {"qweight": stream(codes, bits).t().contiguous(), "qzeros": stream(zeros.T - offset, bits),
            "scales": torch.from_numpy(scales).t().contiguous()}


def gptq_v1(codes, scales, zeros, bits, sym):
    return gptq_v2(codes, scales, zeros, bits, sym, 1)


def awq(codes, scales, zeros, bits, sym):
    return {"qweight": nibbles(codes.T), "qzeros": nibbles(zeros.T),
            "scales": torch.from_numpy(scales).t().contiguous()}


def compressed(codes, scales, zeros, bits, sym):
    found = {"weight_packed": stream(codes, bits), "weight_scale": torch.from_numpy(scales),
             "weight_shape": torch.tensor(codes.shape)}
    return found if sym else found | {"weight_zero_point": stream(zeros.T, bits).t().contiguous()}


def auto_round(packing, **settings):
    return {"quant_method": "auto-round", "packing_format": packing, "data_type": "int", "bits": 4, "group_size": 32,
            "sym": True, "autoround_version": "0.16.1", "block_name_to_quantize": "model.layers"} | settings


def scheme(**weights):
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "version": "0.19.0", "ignore": ["lm_head"], "config_groups": {"group_0": {
                "targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": {
                    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
                    "actorder": None, "dynamic": False} | weights}}}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
       "modules_to_not_convert": None}
KINDS = {  # packer, bits, group size, symmetric, quantization_config
    "W4A16": (compressed, 4, 32, True, scheme()),
    "W4A16 asymmetric": (compressed, 4, 32, False, scheme(symmetric=False)),
    "W4A16 channel": (compressed, 4, -1, True, scheme(strategy="channel", group_size=None)),
    "W8A16": (compressed, 8, 64, True, scheme(num_bits=8, group_size=64)),
    "W8A16 channel asymmetric": (compressed, 8, -1, False,
                                 scheme(num_bits=8, strategy="channel", group_size=None, symmetric=False)),
    "W3A16": (compressed, 3, 32, False, scheme(num_bits=3, symmetric=False)),
    "AWQ": (awq, 4, 32, False, AWQ),
    "auto_round:auto_gptq": (gptq_v1, 4, 32, True, auto_round("auto_round:auto_gptq")),
    "auto_round": (gptq_v2, 4, 64, False, auto_round("auto_round", group_size=64, sym=False)),
    "auto_round:auto_awq": (awq, 4, 32, False, auto_round("auto_round:auto_awq", sym=False)),
}


@pytest.fixture
def written(tiny_llama, tmp_path):
    """Write a directory of a kind: its path, and logits of a transformers model with the dequantized weights."""
    def write(packer, bits, group, sym, config, names=BLOCK_LINEARS):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        tensors = load_file(tiny_llama / "model.safetensors")
        for name, linear in model.named_modules():
            if name.endswith(names):
                codes, scales, zeros, weight = grid(linear.weight, bits, group, sym)
                linear.weight.data = weight
                del tensors[f"{name}.weight"]
                parts = packer(codes, scales, zeros, bits, sym)
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        out = tmp_path / "foreign"
        out.mkdir()
        for file in tiny_llama.iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        stated = json.loads((tiny_llama / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(stated | {"quantization_config": config}))
        with torch.inference_mode():
            return out, model(IDS).logits
    return write


def agree(path, expected):
    for found in (load(path, device="cpu", dtype=torch.float32).logits(IDS),
                  hf_model(path, device="cpu", dtype=torch.float32)(IDS).logits.detach()):
        assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_is_read_and_converted(written, tmp_path, kind):
    path, expected = written(*KINDS[kind])
    found = inspect(path)
    assert found.problems == []
    assert (found.quantization.bits, found.quantization.group_size) == KINDS[kind][1:3]
    agree(path, expected)
    report = convert(path, tmp_path / "converted")
    assert report.deviation == 0
    assert report.symmetric == KINDS[kind][3]
    stated = json.loads((tmp_path / "converted" / "config.json").read_text())["quantization_config"]
    assert (stated["quant_method"], stated["format"]) == ("gptq", "gptq" if report.symmetric else "gptq_v2")
    agree(tmp_path / "converted", expected)


def test_scales_in_bfloat16_are_converted_to_float16(written, tmp_path):
    def narrow(*arguments):
        found = compressed(*arguments)
        return found | {"weight_scale": found["weight_scale"].bfloat16()}

    path, _ = written(narrow, *KINDS["W4A16"][1:])
    assert convert(path, tmp_path / "converted").deviation == 0
    agree(tmp_path / "converted", load(path, device="cpu", dtype=torch.float32).logits(IDS))


def test_groups_in_activation_order_are_read(written):
    """llm-compressor's actorder "group", as its versions of 2025 wrote it."""
    order = {}

    def ordered(codes, scales, zeros, bits, sym):
        order[codes.shape[1]] = index = torch.randperm(codes.shape[1])
        groups = torch.arange(codes.shape[1]) // 32
        return compressed(codes, scales, zeros, bits, sym) | {"weight_g_idx": groups[index].int()}

    path, _ = written(ordered, 4, 32, True, scheme(actorder="group"))
    model, tensors = hf_model(path, device="cpu", dtype=torch.float32), load_file(path / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        scales, index = tensors[f"{name}.weight_scale"].float(), tensors[f"{name}.weight_g_idx"].long()
        words = tensors[f"{name}.weight_packed"].numpy().view(np.uint8)
        codes = np.stack([words & 15, words >> 4], -1).reshape(len(words), -1).astype(np.float32)
        x = torch.randn(3, codes.shape[1])
        expected = x @ (scales[:, index] * (torch.from_numpy(codes) - 8)).t()
        torch.testing.assert_close(model.get_submodule(name)(x), expected, rtol=1e-4, atol=1e-4)
    assert inspect(path).act_order


RULES = {  # settings in which layer 1's down_proj has 8 bits and layer 0's o_proj is not quantized
    "compressed-tensors": (compressed, scheme() | {
        "ignore": ["lm_head", "re:.*layers\\.0\\..*o_proj"], "config_groups": scheme()["config_groups"] | {
            "group_1": {"targets": ["model.layers.1.mlp.down_proj"], "weights": scheme(num_bits=8)["config_groups"][
                "group_0"]["weights"]}}}),
    "auto-round": (gptq_v2, auto_round("auto_round", extra_config={
        "model.layers.1.mlp.down_proj": {"bits": 8}, "layers\\.0\\..*o_proj": {"bits": 16, "data_type": "float"}})),
}


@pytest.mark.parametrize("kind", RULES)
def test_settings_of_single_linears_are_read(written, tmp_path, kind, tiny_llama):
    packer, config = RULES[kind]
    path, _ = written(packer, 4, 32, True, config)
    tensors, source = load_file(path / "model.safetensors"), load_file(tiny_llama / "model.safetensors")
    codes, scales, zeros, weight = grid(source["model.layers.1.mlp.down_proj.weight"], 8, 32, True)
    eight = packer(codes, scales, zeros, 8, True)
    tensors |= {f"model.layers.1.mlp.down_proj.{part}": tensor for part, tensor in eight.items()}
    skipped = "model.layers.0.self_attn.o_proj"
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(skipped)}
    save_file(tensors | {f"{skipped}.weight": source[f"{skipped}.weight"]}, path / "model.safetensors",
              metadata={"format": "pt"})
    found = inspect(path)
    assert found.problems == []
    assert found.mixture["mlp.down_proj"] == {"4 bits": 1, "8 bits": 1}
    assert found.mixture["self_attn.o_proj"] == {"float16": 1, "4 bits": 1}
    model, x = hf_model(path, device="cpu", dtype=torch.float32), torch.randn(3, 256)
    torch.testing.assert_close(model.get_submodule("model.layers.1.mlp.down_proj")(x), x @ weight.t(), rtol=1e-3,
                               atol=1e-3)
    convert(path, tmp_path / "converted")
    assert inspect(tmp_path / "converted").mixture == found.mixture
    agree(tmp_path / "converted", load(path, device="cpu", dtype=torch.float32).logits(IDS))


HEADS = {  # packer and settings of a directory whose lm_head is quantized too
    "GPTQModel": (gptq_v1, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
                            "format": "gptq", "lm_head": True}),
    "auto-round": (gptq_v1, auto_round("auto_round:auto_gptq",
                                       extra_config={"lm_head": {"bits": 4, "group_size": 32, "sym": True}})),
    "compressed-tensors": (compressed, scheme() | {"ignore": []}),
}


@pytest.mark.parametrize("kind", HEADS)
def test_quantized_lm_head_is_read_and_converted(written, tmp_path, kind):
    packer, config = HEADS[kind]
    path, expected = written(packer, 4, 32, True, config, (*BLOCK_LINEARS, "lm_head"))
    assert inspect(path).problems == []
    agree(path, expected)
    convert(path, tmp_path / "converted")
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["quantization_config"]["lm_head"] is True
    assert inspect(tmp_path / "converted").problems == []
    agree(tmp_path / "converted", expected)
    assert load(path, device="cpu", head_bits=4).logits(IDS).isfinite().all()
    with pytest.raises(UsageError):
        load(path, device="cpu", head_bits=8)


def test_quantized_lm_head_with_a_missing_tensor_is_the_same_problem_for_inspect_and_load(written):
    packer, config = HEADS["GPTQModel"]
    path, _ = written(packer, 4, 32, True, config, (*BLOCK_LINEARS, "lm_head"))
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.scales"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    problem, = inspect(path).problems
    for action in (load, hf_model):
        with pytest.raises(InputError) as caught:
            action(path, device="cpu")
        assert caught.value.cause == problem


REFUSED = {
    "activations": scheme() | {"config_groups": {"g": scheme()["config_groups"]["group_0"] | {
        "input_activations": {"num_bits": 8}}}},
    "float": scheme(type="float"), "block": scheme(strategy="block"), "5 bits": scheme(num_bits=5),
    "format": scheme() | {"format": "float-quantized"}, "no groups": scheme() | {"config_groups": {}},
    "list": scheme() | {"config_groups": [1]}, "weights": scheme() | {"config_groups": {"g": {"weights": 1}}},
    "gemv": AWQ | {"version": "gemv"}, "AWQ 8": AWQ | {"bits": 8}, "AWQ list": AWQ | {"modules_to_not_convert": 3},
    "packing": auto_round("auto_round:fp8"), "act_bits": auto_round("auto_round", act_bits=8),
    "data_type": auto_round("auto_round", data_type="mx_fp"),
    "extra": auto_round("auto_round", extra_config={"lm_head": 3}), "method": {"quant_method": "exl3"},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_settings_without_a_place_in_the_gptq_format_are_refused(written, kind):
    method = REFUSED[kind]["quant_method"]
    packer = {"compressed-tensors": compressed, "awq": awq}.get(method, gptq_v2)
    path, _ = written(packer, 4, 32, True, REFUSED[kind])
    problem, = inspect(path).problems
    with pytest.raises(InputError) as caught:
        load(path, device="cpu")
    assert caught.value.cause == problem


@pytest.mark.parametrize(("kind", "name"), [("W4A16", "weight_packed"), ("W4A16", "weight_scale"), ("AWQ", "qweight"),
                                            ("AWQ", "scales"), ("W4A16 asymmetric", "weight_zero_point")])
@pytest.mark.parametrize("damage", ["missing", "flat", "short"])
def test_damaged_tensors_are_refused(written, kind, name, damage):
    path, _ = written(*KINDS[kind])
    full, tensors = f"model.layers.1.mlp.up_proj.{name}", load_file(path / "model.safetensors")
    tensor = tensors.pop(full)
    if damage != "missing":
        tensors[full] = tensor.flatten() if damage == "flat" else tensor[:-8].contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert inspect(path).problems
    with pytest.raises(InputError):
        load(path, device="cpu")


def test_truncated_file_is_refused(written):
    path, _ = written(*KINDS["W4A16"])
    cut_short(path / "model.safetensors")
    with pytest.raises(InputError):
        load(path, device="cpu")
