"""Overrides of settings for some linears: validation, output, and the lookup rules of other readers."""

import json
import re
import shutil

import pytest
import regex
import torch
from conftest import job_output, naming, packed_checkpoint
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_belle import Calibration, QuantConfig, hf_model, load, quantize_checkpoint
from gptq_belle.bench.throughput import bench
from gptq_belle.bench.workload import Workload
from gptq_belle.checkpoint.inspection import average_bits, inspect, summary_rows
from gptq_belle.checkpoint.packed_reader import read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import InputError, UsageError
from gptq_belle.models.belle_catalogue import CONFIGS
from gptq_belle.models.discovery import architecture
from gptq_belle.quantization.config import Override
from gptq_belle.quantization.cost_estimate import estimate
from gptq_belle.quantization.job import prepare_job
from gptq_belle.quantization.overrides import parse_override, resolve_overrides

CALIBRATION = Calibration(rows=16, seq_len=64, allow_short=True)
TEXTS = {
    "bloom": ("mlp.dense_4h_to_h=bits:8", r"h\.0\.self_attention\.dense=skip",
              r"h\.1\.self.*dense$=bits:2,group_size:64"),
    "llama": ("(gate|up)_proj=bits:8,group_size:64", r"layers\.0\.self_attn\.[qkv]_proj=skip", r"\.1\..*o_proj=bits:3"),
}
FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
ARCHITECTURES = {"bloom": architecture(CONFIGS["belle-7b"]), "llama": architecture(CONFIGS["llama-7b"])}


def config(kind, *texts, **settings):
    return QuantConfig(group_size=32, overrides=tuple(map(parse_override, texts or TEXTS[kind])), **settings)


def run_job(source, out, **settings):
    return quantize_checkpoint(source, out, config(source.name, **settings), calibration=CALIBRATION)


def rule_of_gptqmodel(dynamic, name):
    """GPTQModel's dynamic_get: the first key that matches from the start; False where it excludes."""
    for key, values in dynamic.items():
        if key.startswith("-:"):
            if re.match(key[2:], name):
                return False
        elif re.match(key.removeprefix("+:"), name):
            return values
    return None


def rule_of_vllm(dynamic, name):
    """vLLM's get_dynamic_override, which matches with another library, with the layer's name in vLLM."""
    for key, values in dynamic.items():
        if regex.match(key.removeprefix("-:").removeprefix("+:"), name):
            return False if key.startswith("-:") else values
    return None


@pytest.mark.parametrize("sort", [False, True], ids=["as written", "sorted"])
@pytest.mark.parametrize("rule", [rule_of_gptqmodel, rule_of_vllm])
def test_rules_of_readers_find_the_bits_of_the_tensors(tiny_model, tmp_path, rule, sort):
    run_job(tiny_model, tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == stated
    dynamic = dict(sorted(stated["dynamic"].items())) if sort else stated["dynamic"]
    tensors, source = (load_file(path / "model.safetensors") for path in (tmp_path / "out", tiny_model))
    arch, seen = ARCHITECTURES[tiny_model.name], set()
    for name in (f"{arch.blocks}.{index}.{linear}" for index in range(2) for linear in arch.linears):
        found, inputs = rule(dynamic, name), source[f"{name}.weight"].shape[1]
        if found is False:
            assert torch.equal(tensors[f"{name}.weight"], source[f"{name}.weight"])
            assert f"{name}.qweight" not in tensors
            seen.add("skip")
            continue
        bits, group = (stated[key] if found is None else found.get(key, stated[key]) for key in ("bits", "group_size"))
        assert len(tensors[f"{name}.qweight"]) == inputs * bits // 32
        assert len(tensors[f"{name}.scales"]) == inputs // group
        assert f"{name}.weight" not in tensors
        seen.add((bits, group))
    assert seen == ({(4, 32), (8, 32), (2, 64), "skip"} if arch.prefix == "transformer" else
                    {(4, 32), (8, 64), (3, 32), "skip"})


def test_vllm_finds_a_fused_linear_by_its_name(tiny_llama, tmp_path):
    run_job(tiny_llama, tmp_path / "out")
    dynamic = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["dynamic"]
    for prefix in ("model.layers.0.", "model.layers.1."):
        for fused, parts in FUSED.items():
            each = [rule_of_vllm(dynamic, f"{prefix}{fused.split('.')[0]}.{part}") for part in parts]
            assert each == [rule_of_vllm(dynamic, prefix + fused)] * len(parts)
    assert rule_of_vllm(dynamic, "model.layers.0.self_attn.qkv_proj") is False
    assert rule_of_vllm(dynamic, "model.layers.1.mlp.gate_up_proj") == {"bits": 8, "group_size": 64}


@pytest.mark.parametrize("settings", [{}, {"sym": False}, {"act_order": True}, {"method": "rtn"}], ids=str)
def test_mixed_checkpoint_has_the_reported_error(tiny_model, tmp_path, settings):
    """The loaded model against transformers with weights dequantized here; and the job's readback."""
    report = run_job(tiny_model, tmp_path / "out", **settings)
    assert report.readback_error < 1e-5
    reader = CheckpointReader(tmp_path / "out")
    stated = read_quantization(reader)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name in reader:  # norms contain channel scales
            parameter.data = reader.tensor(name).float()
    for name, linear in model.named_modules():
        if f"{name}.qweight" in reader:
            linear.weight.data = dequantized(reader, name, stated)
    ids = torch.arange(4, 36)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    found = load(tmp_path / "out", device="cpu", head_bits=16).logits(ids)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def dequantized(reader, name, stated):
    """Dequantized weight (N, K) float32 of one linear, with its number of bits taken from the shapes of its tensors."""
    words, zeros, scales, g_idx = (reader.tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx"))
    bits = len(words) * 32 // len(g_idx)
    codes, zeros = unpacked(words, bits).t(), unpacked(zeros.t().contiguous(), bits)
    zeros = zeros + 1 if stated.checkpoint_format == "gptq" else zeros
    return (codes - zeros[:, g_idx]).float() * scales.t().float()[:, g_idx]


def unpacked(words, bits):
    """Unpack codes from words (R, N) along R, bit by bit, because codes of 3 bits can cross words."""
    stream = (words[:, None] >> torch.arange(32)[None, :, None] & 1).reshape(-1, bits, words.shape[1])
    return (stream << torch.arange(bits)[None, :, None]).sum(1) if words.shape[1] else stream


def test_resumed_job_writes_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    from gptq_belle.quantization.block_quantizer import BlockQuantizer

    run_job(tiny_model, tmp_path / "whole")
    plain = BlockQuantizer.run
    monkeypatch.setattr(BlockQuantizer, "run",
                        lambda self, index, *rest: plain(self, index, *rest) if index == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_job(tiny_model, tmp_path / "cut")
    monkeypatch.setattr(BlockQuantizer, "run", plain)
    with pytest.raises(UsageError, match="overrides"):
        quantize_checkpoint(tiny_model, tmp_path / "cut", QuantConfig(group_size=32), calibration=CALIBRATION)
    assert run_job(tiny_model, tmp_path / "cut").resumed == [1]
    assert job_output(tmp_path / "cut") == job_output(tmp_path / "whole")


def test_report_model_card_inspect_and_bench_show_mixed_bits(tiny_bloom, tmp_path):
    estimated = estimate(prepare_job(tiny_bloom, config("bloom"), CALIBRATION, "cpu"))
    report = run_job(tiny_bloom, tmp_path / "out")
    assert estimated.output == pytest.approx(report.bytes_on_disk, rel=0.05)
    # a block: 3 + 1 + 4 + 4 units of 128 x 128 weights
    average = (4 * 14 + 8 * 8 + 16 + 2) / 24
    assert report.average_bits == pytest.approx(average)
    reader = CheckpointReader(tmp_path / "out")
    assert average_bits(reader, read_quantization(reader)) == pytest.approx(average)
    found = inspect(tmp_path / "out")
    assert found.problems == []
    assert found.parameters == inspect(tiny_bloom).parameters
    assert found.mixture["self_attention.dense"] == {"float16": 1, "2 bits, group size 64": 1}
    assert ("bits on average", f"{average:.2f}") in summary_rows(found)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 and 4 and 8 bits" in card
    assert "| bits 8 |" in card
    assert "| float16 |" in card
    (measured,) = bench([tmp_path / "out"], Workload(4, 2, 1, 1), device="cpu").results
    assert measured.bits == pytest.approx(average)


def test_saved_model_keeps_its_mixed_bits(tiny_llama, tmp_path):
    """transformers sorts the keys of the configuration that it saves."""
    run_job(tiny_llama, tmp_path / "out")
    hf_model(tmp_path / "out", device="cpu").save_pretrained(tmp_path / "saved")
    ids = torch.arange(4, 36)[None]
    ours, theirs = (hf_model(tmp_path / name, device="cpu")(ids).logits for name in ("out", "saved"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("text", "named"), [
    ("mlp", "mlp"), ("=bits:8", "=bits:8"), ("mlp=bits:5", "bits 5"), ("mlp=group_size:48", "group size 48"),
    ("mlp=damp:1", "damp"), ("mlp=bits:8,bits:4", "bits"), ("mlp=bits:x", "bits 'x'"), ("mlp=sym:2", "sym '2'"),
    ("mlp=", "mlp="), ("mlp=skip,bits:4", "skip"), ("(mlp=bits:8", "'(mlp'"), ("(?i)mlp=bits:8", "(?i)mlp")])
def test_malformed_override_is_refused(text, named):
    with pytest.raises(UsageError, match=naming(named)) as caught:
        parse_override(text)
    assert caught.value.remedy


@pytest.mark.parametrize(("kind", "texts", "named"), [
    ("bloom", ["down_proj=bits:8"], ["'down_proj'"]),
    ("bloom", ["mlp=bits:8", r"h\.1=skip"], ["transformer.h.1.mlp.dense_h_to_4h"]),
    ("llama", ["q_proj=bits:8"], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ("llama", ["up_proj=skip"], ["mlp.gate_proj", "mlp.up_proj"]),
    ("llama", ["o_proj|kv_proj=bits:8"], ["model.layers.0.self_attn.qkv_proj"]),
    ("bloom", ["mlp|(attentiom){e<=1}=bits:8"], ["mlp|(attentiom){e<=1}"])], ids=str)
def test_override_that_does_not_suit_the_model_is_refused(kind, texts, named):
    with pytest.raises(UsageError, match=naming(*named)) as caught:
        resolve_overrides(config(kind, *texts), ARCHITECTURES[kind], 2)
    assert caught.value.remedy


def test_remedy_lists_the_names_of_linears():
    with pytest.raises(UsageError) as caught:
        resolve_overrides(config("llama", "dense=bits:8"), ARCHITECTURES["llama"], 3)
    assert all(word in caught.value.remedy for word in ("model.layers.0 to 2", "self_attn.q_proj", "mlp.down_proj"))


def test_overrides_of_the_library_are_checked_too():
    with pytest.raises(UsageError, match=naming("'mlp'")):
        Override("mlp")
    with pytest.raises(UsageError, match=naming("'mlp'")):
        Override("mlp", bits=4, skip=True)


def test_redundant_override_does_not_change_the_format():
    same = resolve_overrides(config("bloom", "mlp=bits:8,sym:true"), ARCHITECTURES["bloom"], 2)
    other = resolve_overrides(config("bloom", "mlp=sym:false"), ARCHITECTURES["bloom"], 2)
    assert (same.checkpoint_format, other.checkpoint_format) == ("gptq", "gptq_v2")
    assert other.for_linear("transformer.h.0.mlp.dense_h_to_4h").checkpoint_format == "gptq_v2"
    assert other.for_linear("transformer.h.0.self_attention.dense").sym
    assert "dynamic" not in QuantConfig().to_dict()


def test_group_size_that_does_not_divide_a_linear_is_refused(tiny_llama, tmp_path):
    path = tmp_path / "odd"
    shutil.copytree(tiny_llama, path)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, intermediate_size=224)).save_pretrained(path)
    with pytest.raises(UsageError, match=naming(64, 224, "model.layers.0.mlp.down_proj")):
        prepare_job(path, config("llama", "down_proj=group_size:64"), CALIBRATION, "cpu")


@pytest.mark.parametrize(("dynamic", "named"), [
    ([1], "dynamic"), ({"a": 1}, "dynamic"), ({"+:mlp": {"bits": 5}}, "bits 5"), ({"+:(": {}}, "'('"),
    ({"+:((.|..)+)+[xyz]{3}": {"bits": 8}}, "((.|..)+)+[xyz]{3}"), ({"+:.*": {"group_size": "x"}}, "group_size"),
    ({"-:.*": {}}, "self_attention.query_key_value"), ({"+:.*mlp": {"bits": 8}}, "8 bits")], ids=str)
def test_dynamic_rules_that_contradict_the_tensors_are_refused(tiny_bloom, tmp_path, dynamic, named):
    path = packed_checkpoint(tiny_bloom, tmp_path / "packed")
    stated = json.loads((path / "config.json").read_text())
    stated["quantization_config"]["dynamic"] = dynamic
    (path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(InputError, match=naming(named)):
        hf_model(path, device="cpu")
    assert inspect(path).problems
