"""hf_model: logits of tiny models in every variant of the format, and rejected checkpoints."""

import json
import shutil

import pytest
import torch
from conftest import naming, packed_checkpoint
from decoders import dequantized
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from gptq_belle.checkpoint.packed_reader import read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.common.devices import resolve_device
from gptq_belle.engine.hf_model import hf_model
from gptq_belle.engine.linear import QuantLinear
from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.formats.quantize_config import Quantization

IDS = torch.tensor([[5, 300, 17, 42, 8, 250, 99, 3, 61], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
VARIANTS = [
    {"bits": 4},
    {"bits": 8},
    {"bits": 2, "group_size": 64},
    {"bits": 3},
    {"bits": 4, "group_size": -1},
    {"bits": 4, "group_size": 128, "sym": False},
    {"bits": 4, "sym": False, "checkpoint_format": "gptq"},
    {"bits": 4, "checkpoint_format": "gptq_v2"},
    {"bits": 4, "sym": False, "act_order": True},
    {"bits": 3, "sym": False, "act_order": True, "checkpoint_format": "gptq"},
    {"bits": 8, "act_order": True, "group_size": 64},
    {"bits": 4, "group_size": 64, "with_g_idx": False},
    {"bits": 8, "group_size": -1, "sym": False, "with_g_idx": False},
]


def name_of(variant):
    return "-".join(f"{key}={value}" for key, value in variant.items())


def expected_logits(source, packed):
    """Logits of transformers in float64 with weights dequantized by the formula."""
    return logits(dequantized(source, packed))


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_logits_of_every_variant(tiny_model, tmp_path, variant):
    packed = packed_checkpoint(tiny_model, tmp_path / "packed", **variant)
    expected = expected_logits(tiny_model, packed)
    assert expected.std() > 0.1
    found = logits(hf_model(packed, device="cpu")).double()
    assert float((found - expected).norm() / expected.norm()) < 2e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("variant", [{}, {"sym": False, "act_order": True}], ids=name_of)
def test_logits_in_bfloat16_without_native_kernels(tiny_model, tmp_path, monkeypatch, variant):
    monkeypatch.setattr("gptq_belle.kernels.cpu_matmul.load_library", lambda: "no compiler")
    packed = packed_checkpoint(tiny_model, tmp_path / "packed", **variant)
    model = hf_model(packed, device="cpu", dtype=torch.bfloat16)
    assert all(repr(m).endswith("CanonicalWeight)") for m in model.modules() if isinstance(m, QuantLinear))
    expected = expected_logits(tiny_model, packed)
    error = (logits(model).double() - expected).norm() / expected.norm()
    assert error < 0.05


def test_logits_of_a_full_precision_directory_equal_transformers(tiny_model):
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ours = hf_model(tiny_model, device="cpu")
    assert not any(isinstance(module, QuantLinear) for module in ours.modules())
    assert torch.equal(logits(ours), logits(theirs))


def test_every_linear_of_the_blocks_is_packed(tiny_model, tmp_path):
    packed = packed_checkpoint(tiny_model, tmp_path / "packed")
    reader, model = CheckpointReader(packed), hf_model(packed, device="cpu")
    found = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert found == [f"{reader.arch.blocks}.{i}.{name}" for i in range(2) for name in reader.arch.linears]


def test_generate_of_transformers_works_after_casts(tiny_model, tmp_path):
    model = hf_model(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cpu")
    before = logits(model)
    first = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    assert first.shape == (1, 15)
    model.half().to(torch.bfloat16).float()
    words = {name: t for name, t in model.state_dict().items() if name.endswith((".qweight", ".scales", ".qzeros"))}
    on_disk = load_file(tmp_path / "packed" / "model.safetensors")
    assert words
    assert all(torch.equal(tensor, on_disk[name]) for name, tensor in words.items())
    model = hf_model(tmp_path / "packed", device="cpu")
    assert torch.equal(logits(model), before)


def test_half_and_bfloat16_logits_are_close(tiny_model, tmp_path):
    model = hf_model(packed_checkpoint(tiny_model, tmp_path / "packed", bits=8), device="cpu")
    before = logits(model)
    for dtype in (torch.float16, torch.bfloat16):
        after = logits(model.to(dtype))
        assert after.dtype == dtype
        assert (after.float() - before).norm() < 0.05 * before.norm()


def test_save_pretrained_round_trip(tiny_model, tmp_path):
    model = hf_model(packed_checkpoint(tiny_model, tmp_path / "packed", bits=3, act_order=True), device="cpu")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(hf_model(tmp_path / "again", device="cpu")), logits(model))


class FloatsMade(TorchDispatchMode):
    """Records the shapes of all floating-point tensors that are created outside the meta device."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.shapes.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_precision_model_is_never_in_memory(tiny_model, tmp_path, dtype):
    packed = packed_checkpoint(tiny_model, tmp_path / "packed")
    source = load_file(tiny_model / "model.safetensors")
    linears = {tuple(t.shape) for name, t in source.items() if f"{name.removesuffix('weight')}qweight"
               in load_file(packed / "model.safetensors")} - {(384, 128)}  # the embedding has that shape
    with FloatsMade() as made:
        model = hf_model(packed, device="cpu", dtype=dtype)
    assert linears
    assert not {shape for n, k in linears for shape in ((n, k), (k, n))} & made.shapes
    held = {tuple(t.shape) for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}
    assert not held & linears


def test_loaded_tensors_do_not_depend_on_the_files(tiny_model, tmp_path):
    packed = packed_checkpoint(tiny_model, tmp_path / "packed")
    model = hf_model(packed, device="cpu")
    before = logits(model)
    file = packed / "model.safetensors"
    with file.open("r+b") as f:
        f.write(b"\0" * file.stat().st_size)
    assert torch.equal(logits(model), before)


def test_lm_head_stays_tied(tiny_bloom, tmp_path):
    model = hf_model(packed_checkpoint(tiny_bloom, tmp_path / "packed"), device="cpu")
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize("equal", [True, False])
def test_stored_head_of_a_tied_model_is_used(tiny_bloom, tmp_path, equal):
    path = shutil.copytree(tiny_bloom, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["transformer.word_embeddings.weight"]
    tensors["lm_head.weight"] = embedding.clone() if equal else embedding * 2
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = hf_model(path, device="cpu")
    assert model.config.tie_word_embeddings is equal
    assert (model.lm_head.weight is model.transformer.word_embeddings.weight) is equal
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].float())


# ---- files of other tools, and files that are wrong ----


def edit(path, *, settings=None, tensors=None, drop=()):
    """Change a packed checkpoint in place: settings (None removes a key), tensors, and names of tensors to remove."""
    config = json.loads((path / "config.json").read_text())
    for key, value in (settings or {}).items():
        config["quantization_config"].pop(key, None)
        if value is not None:
            config["quantization_config"][key] = value
    (path / "config.json").write_text(json.dumps(config))
    (path / "quantize_config.json").unlink(missing_ok=True)
    state = load_file(path / "model.safetensors") | (tensors or {})
    save_file({name: tensor for name, tensor in state.items() if name not in drop}, path / "model.safetensors",
              metadata={"format": "pt"})
    return path


@pytest.fixture
def packed(tiny_llama, tmp_path):
    return packed_checkpoint(tiny_llama, tmp_path / "packed")


LINEAR = "model.layers.1.mlp.up_proj"


def test_configuration_in_quantize_config_alone_is_read(packed):
    before = logits(hf_model(packed, device="cpu"))
    config = json.loads((packed / "config.json").read_text())
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}  # AutoGPTQ's keys
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "quantize_config.json").write_text(json.dumps(old))
    assert torch.equal(logits(hf_model(packed, device="cpu")), before)


def test_zero_biases_that_the_model_does_not_have_are_accepted(packed):
    before = logits(hf_model(packed, device="cpu"))
    edit(packed, tensors={f"{LINEAR}.bias": torch.zeros(256, dtype=torch.float16)})
    assert torch.equal(logits(hf_model(packed, device="cpu")), before)


def test_inverse_frequencies_of_old_files_are_ignored(packed):
    edit(packed, tensors={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    hf_model(packed, device="cpu")


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, ("gptq", 1)),
    ({"format": None, "checkpoint_format": None}, ("gptq", 1)),
    ({"format": None, "checkpoint_format": "gptq_v2"}, ("gptq_v2", 0)),
    ({"format": "gptq", "checkpoint_format": "gptq_v2"}, ("gptq", 1)),
    ({"format": "gptq_v2", "checkpoint_format": "gptq"}, ("gptq_v2", 0)),
])
def test_format_takes_precedence_over_checkpoint_format(packed, settings, expected):
    found = read_quantization(CheckpointReader(edit(packed, settings=settings)))
    assert (found.checkpoint_format, found.zero_offset) == expected


def test_read_quantization(packed, tiny_llama):
    found = read_quantization(CheckpointReader(packed))
    assert found == Quantization(4, 32, True, False, "gptq", "gptq_belle:0.1.0")
    assert read_quantization(CheckpointReader(tiny_llama)) is None


def words_of(bits, inputs, outputs, groups):
    return {
        f"{LINEAR}.qweight": torch.zeros(inputs * bits // 32, outputs, dtype=torch.int32),
        f"{LINEAR}.qzeros": torch.zeros(groups, outputs * bits // 32, dtype=torch.int32),
        f"{LINEAR}.scales": torch.ones(groups, outputs, dtype=torch.float16),
        f"{LINEAR}.g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
    }


@pytest.mark.parametrize(("change", "named"), [
    ({"settings": {"bits": 8}}, ["8 bits", "4 bits"]),
    ({"settings": {"group_size": 128}}, ["group size 128", "group size 32"]),
    ({"settings": {"group_size": -1}}, ["group size -1", "group size 32"]),
    ({"settings": {"bits": 5}}, ["bits 5"]),
    ({"settings": {"bits": None}}, ["bits None"]),
    ({"settings": {"group_size": 0}}, ["group_size", 0]),
    ({"settings": {"quant_method": "eetq"}}, ["quant_method", "awq"]),
    ({"settings": {"format": "marlin"}}, ["format", "marlin"]),
    ({"tensors": words_of(8, 128, 256, 4)}, ["4 bits", LINEAR, "8 bits"]),
    ({"tensors": words_of(4, 128, 256, 2)}, ["group size 32", LINEAR, "group size 64"]),
    ({"tensors": words_of(4, 128, 128, 4)}, [LINEAR, 128, "config.json", 256]),
    ({"tensors": words_of(4, 256, 256, 8)}, [LINEAR, 32, 128, "8 bits"]),
    ({"tensors": {f"{LINEAR}.g_idx": torch.full((128,), 4).int()}}, [LINEAR, "g_idx", "4..4"]),
    ({"tensors": {f"{LINEAR}.qzeros": torch.zeros(4, 3).int()}}, [f"{LINEAR}.qzeros", torch.int32, (4, 3)]),
    ({"tensors": {f"{LINEAR}.bias": torch.zeros(3)}}, [f"{LINEAR}.bias", torch.float32, (3,)]),
    ({"tensors": {"model.norm.weight": torch.ones(64)}}, ["model.norm.weight", (64,)]),
    ({"tensors": {"model.norm.weight": torch.ones(128).int()}}, ["model.norm.weight", torch.int32]),
    ({"tensors": {"model.layers.7.mlp.up_proj.weight": torch.ones(2)}}, ["model.layers.7.mlp.up_proj.weight"]),
    ({"drop": ["model.norm.weight"]}, ["model.norm.weight"]),
    ({"drop": [f"{LINEAR}.scales"]}, [f"{LINEAR}.scales"]),
    ({"drop": [f"{LINEAR}.qweight"]}, [f"{LINEAR}.qweight"]),
    ({"drop": ["lm_head.weight"]}, ["lm_head.weight"]),
])
def test_inconsistent_tensors_are_named(packed, change, named):
    with pytest.raises(InputError, match=naming(*named)) as caught:
        hf_model(edit(packed, **change), device="cpu")
    assert caught.value.remedy


def test_missing_bias_is_named(tiny_bloom, tmp_path):
    path = packed_checkpoint(tiny_bloom, tmp_path / "packed")
    name = "transformer.h.0.mlp.dense_h_to_4h.bias"
    with pytest.raises(InputError, match=naming(name)):
        hf_model(edit(path, drop=[name]), device="cpu")


def test_packed_weights_without_a_configuration_are_refused(packed):
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "quantize_config.json").unlink()
    with pytest.raises(InputError, match=naming(packed)):
        hf_model(packed, device="cpu")


def test_code_of_a_model_directory_is_not_run(tiny_llama, tmp_path):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    assert type(hf_model(path, device="cpu")).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_device_names_are_resolved():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(HardwareError, match=naming("cuda:99")):
        resolve_device("cuda:99")
    for name in ("gpu", "cuda:x", "cuda0", "", "cpu:1"):
        with pytest.raises(UsageError, match=naming(f"'{name}'")):
            resolve_device(name)


def test_unsupported_dtype_is_refused(tiny_llama):
    with pytest.raises(UsageError, match=naming(torch.int8)):
        hf_model(tiny_llama, device="cpu", dtype=torch.int8)
