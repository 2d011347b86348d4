"""AutoGPTQ's interface: a notebook whose import is changed, and the arguments that have an effect."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import naming, packed_checkpoint, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoTokenizer

from gptq_belle import QuantConfig, hf_model, quantize_checkpoint
from gptq_belle.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig, exllama_set_max_input_length
from gptq_belle.compat.auto_gptq_arguments import device_name, token_rows
from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.quantization.calibration.rows import Calibration

ROOT = Path(__file__).resolve().parent.parent
CONFIG = BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)
IDS = torch.tensor([[5, 300, 17, 42, 8, 250, 99, 3, 61]])
EXAMPLES = [{"input_ids": torch.randint(4, 384, (1, 40)), "attention_mask": torch.ones(1, 40)} for _ in range(6)]


def test_a_notebook_runs_with_only_its_import_changed(tmp_path):
    text = (ROOT / "tests" / "interop" / "notebook.py").read_text(encoding="utf-8")
    changed = text.replace("from auto_gptq import", "from gptq_belle.compat.auto_gptq import")
    assert len([1 for a, b in zip(text.splitlines(), changed.splitlines(), strict=True) if a != b]) == 1
    (tmp_path / "notebook.py").write_text(changed, encoding="utf-8")
    source, out = ROOT / "examples" / "belle_tiny" / "llama", tmp_path / "out"
    done = subprocess.run([sys.executable, "notebook.py", source, out, "cpu"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = dict(line.split(": ", 1) for line in done.stdout.replace("\n\nAssistant", " Assistant").splitlines()
                if line.startswith(("generate: ", "pipeline: ")))
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer("Human: 一加一等于几?\n\nAssistant:", return_tensors="pt")
    ours = tokenizer.decode(hf_model(out, device="cpu").generate(**ids, max_new_tokens=16, do_sample=False)[0])
    assert printed["generate"] == ours.replace("\n\nAssistant", " Assistant")
    assert printed["generate"].startswith(printed["pipeline"])
    assert json.loads((out / "quantize_config.json").read_text())["damp_percent"] == 0.1


def quantized(source, config=CONFIG, examples=EXAMPLES):
    model = AutoGPTQForCausalLM.from_pretrained(str(source), config)
    model.quantize(examples)
    return model


@pytest.mark.parametrize("settings", [{}, {"sym": False}, {"desc_act": True, "bits": 8}, {"group_size": -1, "bits": 3}])
def test_output_equals_that_of_quantize_checkpoint(tiny_model, tmp_path, settings):
    config = BaseQuantizeConfig(**{"group_size": 32, "desc_act": False} | settings)
    quantized(tiny_model, config).save_quantized(tmp_path / "theirs")
    ours = QuantConfig(config.bits, config.group_size, config.sym, config.desc_act)
    rows = torch.cat([example["input_ids"] for example in EXAMPLES])
    quantize_checkpoint(tiny_model, tmp_path / "ours", ours, calibration=Calibration(rows, allow_short=True))
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    report = json.loads((tmp_path / "theirs" / "quantization_report.json").read_text())["calibration"]
    assert (report["source"], report["rows"], report["seq_len"]) == ("token ids", 6, 40)


def test_quantize_save_and_load_again(tiny_model, tmp_path):
    model = quantized(tiny_model)
    assert model.quantized
    assert len(model.report.linears) > 7
    before = model(IDS).logits
    model.save_pretrained(tmp_path / "out")
    again = AutoGPTQForCausalLM.from_quantized(tmp_path / "out", device="cpu")
    assert torch.equal(again(input_ids=IDS).logits, before)
    assert torch.equal(again.forward(IDS).logits, before)
    assert torch.equal(again.model(IDS).logits, before)
    assert (again.device, again.hf_device_map, again.config.model_type) == (
        torch.device("cpu"), None, model.config.model_type)
    assert again.to("cpu") is again
    assert again.generate(input_ids=IDS, max_new_tokens=3, do_sample=False).shape == (1, 12)
    assert again.num_parameters() == again.model.num_parameters()  # other attributes are those of the model
    assert exllama_set_max_input_length(again, 4096) is again
    with pytest.raises(UsageError):
        again.quantize(EXAMPLES)


def test_model_before_quantizing_is_the_full_precision_model(tiny_llama):
    model = AutoGPTQForCausalLM.from_pretrained(tiny_llama, CONFIG)
    assert model.config.model_type == "llama"
    assert torch.equal(model(IDS).logits, hf_model(tiny_llama)(IDS).logits)
    with pytest.raises(UsageError):
        model.save_quantized("nowhere")


def test_directory_written_by_auto_gptq_is_loaded(tiny_llama, tmp_path):
    """The file name and the few settings that AutoGPTQ writes, with and without model_basename."""
    packed = packed_checkpoint(tiny_llama, tmp_path / "packed")
    (packed / "model.safetensors").rename(packed / "gptq_model-4bit-32g.safetensors")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = BaseQuantizeConfig(group_size=32, desc_act=False).to_dict()
    (packed / "config.json").write_text(json.dumps(config))
    BaseQuantizeConfig(group_size=32, desc_act=False).save_pretrained(packed)
    expected = hf_model(packed)(IDS).logits
    for name in (None, "gptq_model-4bit-32g"):
        model = AutoGPTQForCausalLM.from_quantized(packed, model_basename=name, quantize_config=None)
        assert torch.equal(model(IDS).logits, expected)
    assert model.quantize_config == BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)
    shutil.copy(tiny_llama / "model.safetensors", packed / "model.safetensors")
    with pytest.raises(UsageError, match=naming(packed, "gptq_model-4bit-32g")):
        AutoGPTQForCausalLM.from_quantized(packed, model_basename="gptq_model-4bit-32g")


def test_quantize_config_that_contradicts_the_directory_is_refused(tiny_llama, tmp_path):
    packed = packed_checkpoint(tiny_llama, tmp_path / "packed")
    with pytest.raises(UsageError, match=naming("8 bits", 32, 4)):
        AutoGPTQForCausalLM.from_quantized(packed, quantize_config=BaseQuantizeConfig(8, 32))
    with pytest.raises(InputError, match=naming(tiny_llama)):
        AutoGPTQForCausalLM.from_quantized(tiny_llama)


def test_torch_dtype_sets_the_dtype_of_a_loaded_model(tiny_llama, tmp_path):
    packed = packed_checkpoint(tiny_llama, tmp_path / "packed")
    assert AutoGPTQForCausalLM.from_quantized(packed, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


# ---- saving ----


def test_saving_twice_and_next_to_a_tokenizer_works(tiny_llama, tmp_path):
    model = quantized(tiny_llama)
    tiny_tokenizer().save_pretrained(tmp_path / "out")
    for _ in range(2):
        model.save_quantized(str(tmp_path / "out"), use_safetensors=True)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]


def test_weights_of_other_models_are_not_overwritten(tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama, tmp_path / "model")
    model = quantized(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(UsageError, match=naming(source)):
        model.save_quantized(source)
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}


def test_saving_into_the_directory_it_was_loaded_from_changes_nothing(tiny_llama, tmp_path):
    packed = packed_checkpoint(tiny_llama, tmp_path / "packed")
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    AutoGPTQForCausalLM.from_quantized(packed).save_quantized(packed)
    assert before == {path.name: path.read_bytes() for path in packed.iterdir()}


def test_temporary_folder_is_deleted_with_the_model(tiny_llama):
    model = quantized(tiny_llama)
    folder = model.path.parent
    assert folder.exists()
    del model
    assert not folder.exists()


# ---- examples ----


def test_examples_of_equal_length_become_the_calibration_rows():
    assert torch.equal(token_rows(EXAMPLES, 2), torch.cat([example["input_ids"] for example in EXAMPLES]))


def test_examples_are_packed_without_padding_and_with_eos_between():
    examples = [{"input_ids": [9, 8, 7, 3, 3], "attention_mask": [1, 1, 1, 0, 0]},
                {"input_ids": torch.tensor([[3, 5, 2], [4, 4, 4]]),
                 "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
                {"input_ids": torch.tensor([6, 6, 6, 6])}]
    assert token_rows(examples, 2).tolist() == [[9, 8, 7, 2], [5, 2, 4, 4], [4, 2, 6, 6]]
    assert token_rows(examples, None).tolist() == [[9, 8, 7, 5], [2, 4, 4, 4], [6, 6, 6, 6]]


@pytest.mark.parametrize("examples", [
    [], [{"attention_mask": [1]}], ["text"], [{"input_ids": "text"}], [{"input_ids": [1.5]}],
    [{"input_ids": [1, 2], "attention_mask": [1]}], [{"input_ids": [1], "attention_mask": [0]}],
])
def test_examples_that_are_not_tokenized_are_refused(examples):
    with pytest.raises(InputError, match="example"):
        token_rows(examples, 2)


def test_tokens_beyond_the_vocabulary_are_refused(tiny_llama):
    with pytest.raises(InputError, match=naming(384)):
        quantized(tiny_llama, examples=[{"input_ids": [*range(1, 40), 5000]}])


# ---- arguments ----


def test_ignored_arguments_warn_once_and_only_when_given(tiny_llama, tmp_path):
    packed = packed_checkpoint(tiny_llama, tmp_path / "packed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoGPTQForCausalLM.from_quantized(packed, use_triton=False, disable_exllama=None, trust_remote_code=False)
    with pytest.warns(UserWarning, match=naming("use_triton", "trust_remote_code")) as caught:
        AutoGPTQForCausalLM.from_quantized(packed, use_triton=True, trust_remote_code=True)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="max_memory"):
        model = AutoGPTQForCausalLM.from_pretrained(tiny_llama, CONFIG, max_memory={0: "10GB"})
    with pytest.warns(UserWarning, match="batch_size"):
        model.quantize(EXAMPLES, batch_size=4)
    with pytest.warns(UserWarning, match="use_safetensors"):
        model.save_quantized(tmp_path / "out", use_safetensors=False)


@pytest.mark.parametrize("call", [
    lambda source, packed: AutoGPTQForCausalLM.from_quantized(packed, revision="main"),
    lambda source, packed: AutoGPTQForCausalLM.from_quantized(packed, use_trition=True),
    lambda source, packed: AutoGPTQForCausalLM.from_pretrained(source, CONFIG, subfolder="x"),
    lambda source, packed: AutoGPTQForCausalLM.from_pretrained(source, CONFIG).quantize(EXAMPLES, epochs=3),
    lambda source, packed: AutoGPTQForCausalLM.from_pretrained(source, BaseQuantizeConfig(is_marlin_format=True)),
    lambda source, packed: AutoGPTQForCausalLM.from_pretrained(source, BaseQuantizeConfig(static_groups=True)),
    lambda source, packed: AutoGPTQForCausalLM.from_pretrained(source, BaseQuantizeConfig(true_sequential=False)),
])
def test_unsupported_arguments_are_refused(tiny_llama, tmp_path, call):
    with pytest.raises(UsageError, match="is not supported"):
        call(tiny_llama, packed_checkpoint(tiny_llama, tmp_path / "packed"))


@pytest.mark.parametrize(("config", "message"), [({"bits": 5}, "bits 5"), ({"group_size": 100}, "group size 100"),
                                                 ({"damp_percent": 2}, "damp 2")])
def test_settings_out_of_range_are_refused(tiny_llama, config, message):
    with pytest.raises(UsageError, match=message):
        AutoGPTQForCausalLM.from_pretrained(tiny_llama, BaseQuantizeConfig(**config))


def test_device_arguments_are_translated():
    names = [device_name(None, None), device_name(None, "auto"), device_name(0, None), device_name(None, {"": 1}),
             device_name("cpu", "auto"), device_name(torch.device("cuda", 2), None), device_name(None, "cuda:0"),
             device_name(None, {"a": "cpu", "b": "cpu"})]
    assert names == ["auto", "auto", "cuda:0", "cuda:1", "cpu", "cuda:2", "cuda:0", "cpu"]
    with pytest.raises(UsageError, match=naming("cuda:0", "cuda:1")):
        device_name(None, {"a": 0, "b": 1})


def test_unavailable_device_is_refused(tiny_llama, tmp_path):
    with pytest.raises(HardwareError, match=naming("cuda:9")):
        AutoGPTQForCausalLM.from_quantized(packed_checkpoint(tiny_llama, tmp_path / "packed"), device="cuda:9")


def test_direct_construction_is_refused():
    with pytest.raises(UsageError, match="from_quantized"):
        AutoGPTQForCausalLM()
