"""Architectures by discovery: tiny models of many kinds, quantized, loaded, compared with transformers, and served."""

import json
from dataclasses import replace

import httpx
import pytest
import torch
from architectures import KINDS, tiny
from conftest import job_output, naming
from decoders import dequantized
from server_process import serving
from test_journal import InterruptInBlock
from transformers import AutoConfig

import gptq_belle
from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.transformers_decoder import TransformersDecoder
from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.models.belle_catalogue import CONFIGS
from gptq_belle.models.discovery import architecture
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.calibration.rows import Calibration
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint
from gptq_belle.quantization.structure_check import check_structure

CPU = torch.device("cpu")


def quantized(source, out, bits=4, preset="fast", **options):
    rows = Calibration(rows=8, seq_len=64, allow_short=True)
    quantize_checkpoint(source, out, QuantConfig(bits=bits, group_size=32, preset=preset), calibration=rows,
                        device="cpu", **options)
    return out


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


def check_against_transformers(kind, tmp_path, bits, preset="fast"):
    """Logits without a cache, after a prefill in two chunks and after single steps; and a batch of answers."""
    source = tiny(kind, tmp_path)
    model = gptq_belle.load(quantized(source, tmp_path / "out", bits, preset), device="cpu", cache="float32")
    assert isinstance(model.decoder, TransformersDecoder)
    ids = torch.randint(4, model.vocabulary_size, (2, 40))
    with torch.inference_mode():
        expected = dequantized(source, tmp_path / "out", torch.float32)(ids).logits
    assert expected.std() > 0.01
    assert difference(model.logits(ids), expected) < 1e-4
    cache = model.new_cache(2, 40)
    model.prefill_slot(ids[0, :14], cache, 1)
    steps = [model.prefill_slot(ids[0, 14:30], cache, 1, 14)]
    steps += [model.decode_slots(ids[0, t : t + 1], cache, [1], [t]) for t in range(30, 40)]
    assert difference(torch.cat(steps), expected[0, 29:]) < 1e-4
    prompts, options = [row.tolist() for row in ids[:, :9]], {"max_new_tokens": 8, "ignore_eos": True}
    assert model.generate(prompts, **options) == [model.generate(prompt, **options) for prompt in prompts]
    return source, tmp_path / "out"


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_4_bits_equal_transformers(kind, tmp_path):
    check_against_transformers(kind, tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_8_bits_equal_transformers_and_are_served(kind, tmp_path):
    _, out = check_against_transformers(kind, tmp_path, 8)
    assert inspect(out).problems == []
    assert inspect(out).decoder == "transformers"
    with serving(out, tmp_path / "log", "--device", "cpu") as server:
        found = httpx.post(f"{server.url}/v1/completions", timeout=60, json={
            "prompt": "北京的历史", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "model": out.name}).json()
    expected = gptq_belle.load(out, device="cpu").generate("北京的历史", max_new_tokens=6, ignore_eos=True)
    assert found["choices"][0]["text"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["best", "max"])
@pytest.mark.parametrize("kind", ["cohere", "gemma3_text", "opt", "phi3"])
def test_presets_with_targets_and_block_refinement(kind, preset, tmp_path):
    check_against_transformers(kind, tmp_path, 3, preset)


def test_interrupted_job_resumes_with_the_same_output(tmp_path):
    source = tiny("olmo2", tmp_path)
    whole = quantized(source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quantized(source, tmp_path / "out", progress=InterruptInBlock(1))
    quantized(source, tmp_path / "out")
    assert job_output(tmp_path / "out")[0] == job_output(whole)[0]


def test_memory_limit_spills_activations(tmp_path):
    source = tiny("phi", tmp_path)
    with pytest.raises(HardwareError) as caught:
        quantized(source, tmp_path / "out", memory=1 << 20)
    needed = int(caught.value.remedy.split("--memory ")[1].split("MiB")[0])
    spilled = quantized(source, tmp_path / "spilled", memory=needed << 20)
    assert job_output(spilled)[0] == job_output(quantized(source, tmp_path / "whole"))[0]


def test_command_line_runs_a_discovered_architecture(belle, tmp_path):
    source = tiny("qwen3", tmp_path)
    code, _, errors = belle("quantize", source, tmp_path / "out", "--bits", 4, "--group-size", 32, "--preset", "fast",
                            "--rows", 8, "--seq-len", 64, "--allow-short", "--device", "cpu")
    assert code == 0, errors
    code, text, errors = belle("generate", tmp_path / "out", "--prompt", "你好", "--max-tokens", 4, "--device", "cpu",
                               "--json")
    assert code == 0, errors
    assert json.loads(text)
    code, text, _ = belle("inspect", tmp_path / "out", "--json")
    assert (code, json.loads(text)["decoder"]) == (0, "transformers")
    code, text, errors = belle("bench", tmp_path / "out", "--device", "cpu", "--prompt-tokens", 16, "-r", 1,
                               "--new-tokens", 4, "--json")
    assert code == 0, errors


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "phimoe", "granitemoe"])
def test_mixture_of_experts_is_refused_by_name(model_type):
    with pytest.raises(InputError, match=naming(model_type)) as caught:
        architecture(AutoConfig.for_model(model_type, num_hidden_layers=2).to_dict())
    assert "mixture of experts" in caught.value.cause


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox_japanese", "mamba", "bert", "deepseek_v3", "t5", "nothing"])
def test_other_structures_are_refused_by_name(model_type):
    config = {"model_type": model_type} if model_type == "nothing" else AutoConfig.for_model(
        model_type, num_hidden_layers=2).to_dict()
    with pytest.raises(InputError, match=naming(model_type)) as caught:
        architecture(config)
    assert "\n" not in caught.value.cause


def test_todays_architectures_are_discovered():
    bloom, llama = architecture(CONFIGS["belle-7b"]), architecture(CONFIGS["llama-7b"])
    assert bloom.stages == (("self_attention.query_key_value",), ("self_attention.dense",), ("mlp.dense_h_to_4h",),
                            ("mlp.dense_4h_to_h",))
    assert bloom.modules_before == ("transformer.word_embeddings", "transformer.word_embeddings_layernorm")
    assert (bloom.blocks, bloom.modules_after, bloom.attention) == (
        "transformer.h", ("transformer.ln_f",), "self_attention")
    assert llama.stages == (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
                            ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
    assert llama.fused == ("self_attn.qkv_proj", "", "mlp.gate_up_proj", "")
    assert (llama.output, llama.inner_copies, bloom.inner_copies) == ("self_attn.o_proj", 4, 2)


@pytest.mark.parametrize("wrong", [
    {"stages": (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("attn.out_proj", "mlp.fc_in"), ("mlp.fc_out",))},
    {"attention": "mlp", "output": "mlp.fc_out"}], ids=["stages", "attention"])
def test_wrong_structure_is_refused_before_any_work(tmp_path, wrong):
    reader = CheckpointReader(tiny("gptj", tmp_path))
    check_structure(BlockStream(reader, CPU))
    reader.arch = replace(reader.arch, **wrong)
    with pytest.raises(InputError, match=naming("gptj")):
        check_structure(BlockStream(reader, CPU))


def test_packed_head_needs_a_native_decoder(tmp_path):
    source = tiny("gemma", tmp_path)
    with pytest.raises(UsageError):
        gptq_belle.load(source, device="cpu", head_bits=8)
    with pytest.raises(UsageError):
        quantize_checkpoint(source, tmp_path / "out", QuantConfig(method="rtn", group_size=32, head_bits=8))


def test_nonfinite_layer_is_named(tmp_path):
    model = gptq_belle.load(tiny("stablelm", tmp_path), device="cpu")
    model.decoder.model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0] = torch.inf
    with pytest.raises(InputError, match=naming("model.layers.1")):
        model.logits(torch.tensor([[5, 6, 7]]))
