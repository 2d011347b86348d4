"""transformers' from_pretrained with gptq_belle's kernels: outputs, saving, undoing, and other methods unaffected."""

import json

import pytest
import torch
from conftest import naming, packed_checkpoint, tiny_tokenizer
from safetensors.torch import load_file
from test_hf_model import IDS, VARIANTS, edit, expected_logits, logits, name_of
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTQConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from gptq_belle import QuantConfig, hf_model, load, patch_transformers, quantize_checkpoint
from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.engine.linear import QuantLinear
from gptq_belle.errors import InputError
from gptq_belle.quantization.overrides import parse_override


@pytest.fixture
def patched():
    undo = patch_transformers()
    yield
    undo()


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_logits_are_those_of_hf_model(tiny_model, tmp_path, variant):
    packed = packed_checkpoint(tiny_model, tmp_path / "packed", **variant)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) > 7
    assert torch.equal(logits(model), logits(hf_model(packed, device="cpu")))
    expected = expected_logits(tiny_model, packed)
    assert float((logits(model).double() - expected).norm() / expected.norm()) < 2e-4


@pytest.mark.usefixtures("patched")
def test_generate_and_the_dtype_of_the_file(tiny_model, tmp_path):
    packed = packed_checkpoint(tiny_model, tmp_path / "packed", bits=8)
    model = AutoModelForCausalLM.from_pretrained(packed, device_map="cpu")
    assert model.dtype == torch.float16
    ours = hf_model(packed, device="cpu")
    assert float((logits(model).float() - logits(ours)).norm() / logits(ours).norm()) < 0.02
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False).shape == (1, 13)


@pytest.mark.usefixtures("patched")
def test_the_model_without_a_head(tiny_model, tmp_path):
    packed = packed_checkpoint(tiny_model, tmp_path / "packed")
    model = AutoModel.from_pretrained(packed, dtype=torch.float32)
    with torch.inference_mode():
        ours = hf_model(packed, device="cpu").base_model
        assert torch.equal(model(IDS).last_hidden_state, ours(IDS).last_hidden_state)


@pytest.mark.usefixtures("patched")
def test_casting_the_model_is_refused_by_transformers(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_checkpoint(tiny_llama, tmp_path / "packed"))
    with pytest.raises(ValueError, match="GPTQ"):
        model.to(torch.float32)


@pytest.mark.usefixtures("patched")
def test_unquantized_models_load_unchanged(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


@pytest.mark.usefixtures("patched")
def test_packed_models_of_other_architectures_are_refused_with_a_remedy(tmp_path):
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=99)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=naming("gpt2", "patch_transformers")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_undo_restores_transformers():
    before = dict(AUTO_QUANTIZER_MAPPING)
    undo, again = patch_transformers(), patch_transformers()
    changed = {name for name in before if AUTO_QUANTIZER_MAPPING[name] is not before[name]}
    assert changed == {"gptq"}
    again()
    assert before == AUTO_QUANTIZER_MAPPING
    undo()
    assert before == AUTO_QUANTIZER_MAPPING


def test_undo_keeps_patches_of_others(monkeypatch):
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "gptq", AUTO_QUANTIZER_MAPPING["gptq"])
    undo = patch_transformers()
    AUTO_QUANTIZER_MAPPING["gptq"] = other = object()
    undo()
    assert AUTO_QUANTIZER_MAPPING["gptq"] is other


@pytest.mark.usefixtures("patched")
def test_quantizing_with_transformers_is_not_intercepted(tiny_llama):
    with pytest.raises(ImportError, match="optimum"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=GPTQConfig(bits=4, dataset=["text"]))


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize(("change", "named"), [
    ({"settings": {"bits": 8}}, ["8 bits"]),
    ({"settings": {"group_size": 64}}, ["group size", 64]),
    ({"tensors": {"model.layers.1.mlp.up_proj.g_idx": torch.full((128,), 9).int()}},
     ["model.layers.1.mlp.up_proj", "g_idx", "9..9"]),
])
def test_tensors_that_do_not_fit_the_settings_are_named(tiny_llama, tmp_path, change, named):
    packed = edit(packed_checkpoint(tiny_llama, tmp_path / "packed"), **change)
    with pytest.raises(InputError, match=naming(*named)):
        AutoModelForCausalLM.from_pretrained(packed)


# ---- saving ----


def by_transformers(packed):
    undo = patch_transformers()
    try:
        return AutoModelForCausalLM.from_pretrained(packed)
    finally:
        undo()


def by_hf_model(packed):
    return hf_model(packed, device="cpu", dtype=torch.float16)


@pytest.mark.parametrize("loaded", [by_hf_model, by_transformers])
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_save_pretrained_writes_a_standard_directory(tiny_model, tmp_path, variant, loaded):
    packed = packed_checkpoint(tiny_model, tmp_path / "packed", **variant)
    model = loaded(packed)
    model.save_pretrained(tmp_path / "again")
    tiny_tokenizer().save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (packed, tmp_path / "again"))
    extra = {name for name in after if name.endswith(".g_idx")} if not variant.get("with_g_idx", True) else set()
    assert after.keys() - extra == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    stated = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    expected = json.loads((packed / "quantize_config.json").read_text())
    for key in ("quant_method", "bits", "group_size", "desc_act", "sym", "format", "checkpoint_format"):
        assert stated[key] == expected[key], key
    assert inspect(tmp_path / "again").problems == []
    for path in (tmp_path / "again", packed):
        assert torch.equal(logits(hf_model(path, device="cpu")), logits(hf_model(packed, device="cpu")))
    assert load(tmp_path / "again", device="cpu").generate("你好", max_new_tokens=3) == load(
        packed, device="cpu").generate("你好", max_new_tokens=3)


def test_linears_of_other_bits_and_unquantized_ones(tiny_model, tmp_path):
    rules = (parse_override("down_proj|dense_4h_to_h=bits:8"), parse_override("o_proj|self_attention.dense=skip"))
    quantize_checkpoint(tiny_model, tmp_path / "packed", QuantConfig(group_size=32, method="rtn", overrides=rules))
    model = by_transformers(tmp_path / "packed")
    kinds = {type(module) for name, module in model.named_modules() if name.endswith(("o_proj", "attention.dense"))}
    assert kinds == {torch.nn.Linear}
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / path / "model.safetensors") for path in ("packed", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    found, expected = (logits(hf_model(tmp_path / path, device="cpu")) for path in ("again", "packed"))
    assert torch.equal(found, expected)


def test_a_format_that_transformers_reads_otherwise_is_kept(tiny_llama, tmp_path):
    packed = edit(packed_checkpoint(tiny_llama, tmp_path / "packed", sym=False),
                  settings={"checkpoint_format": "gptq", "format": "gptq_v2"})
    model = by_transformers(packed)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(hf_model(tmp_path / "again", device="cpu")), logits(hf_model(packed, device="cpu")))
