"""The whole job on tiny models of both architectures: output, refusals and memory."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import naming, tiny_tokenizer
from safetensors.torch import load_file, save_file

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import GptqBelleError, InputError, UsageError
from gptq_belle.formats.gptq_weight import PackedWeight, unpack
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.calibration.rows import Calibration, calibration_rows
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint
from gptq_belle.quantization.solver import round_to_nearest

SETTINGS = {"rows": 32, "seq_len": 64}


def job(source, out, *, bits=4, group_size=32, **options):
    settings = {key: options.pop(key) for key in ("sym", "act_order", "method") if key in options}
    return quantize_checkpoint(source, out, QuantConfig(bits=bits, group_size=group_size, **settings),
                               calibration=Calibration(**(SETTINGS | options)))


def packed(directory, name, parts=("qweight", "qzeros", "scales", "g_idx")):
    tensors = load_file(directory / "model.safetensors")
    return PackedWeight(*(tensors[f"{name}.{part}"] for part in parts))


def first_linear(reader):
    return f"{reader.arch.blocks}.0.{reader.arch.linears[0]}"


@pytest.mark.parametrize(("bits", "zero_word"), [(4, 0x77777777), (8, 0x7F7F7F7F)])
def test_output_of_both_architectures_is_standard(tiny_model, tmp_path, bits, zero_word):
    out = tmp_path / "out"
    report = job(tiny_model, out, bits=bits)
    source, written = CheckpointReader(tiny_model), CheckpointReader(out)
    blocks = source.config.get("n_layer") or source.config["num_hidden_layers"]
    names = [f"{source.arch.blocks}.{i}.{linear}" for i in range(blocks) for linear in source.arch.linears]
    assert [row.name for row in report.linears] == names
    for name in names:
        outputs, inputs = source.shape(f"{name}.weight")
        weight = packed(out, name)
        assert weight.qweight.shape == (inputs * bits // 32, outputs)
        assert weight.scales.dtype == torch.float16
        assert torch.equal(weight.g_idx, torch.arange(inputs, dtype=torch.int32) // 32)
        assert (weight.qzeros == torch.tensor(zero_word, dtype=torch.int64).to(torch.int32)).all()
    unquantized = {name for name in source if name.removesuffix(".weight") not in names}
    assert unquantized == {name for name in written if name.endswith((".weight", ".bias"))}
    # norms with channel scales: test_channel_scales.py
    changed = {name for name in unquantized if not torch.equal(source.tensor(name).half(), written.tensor(name))}
    assert all(name.rpartition(".")[0].endswith(source.arch.norms[::2]) for name in changed)
    assert report.readback_error == 0


def test_the_directory_is_complete(tiny_model, tmp_path):
    out = tmp_path / "out"
    report = job(tiny_model, out)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == json.loads((out / "quantize_config.json").read_text())
    assert config["torch_dtype"] == "float16"
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "Human:" in tokenizer["chat_template"]
    assert "4 bits" in (out / "README.md").read_text(encoding="utf-8")
    stated = json.loads((out / "quantization_report.json").read_text())
    assert len(stated["linears"]) == len(report.linears)
    assert stated["calibration"]["rows"] == 32
    assert len(stated["calibration"]["sha256"]) == 64
    assert 0 < stated["mean_error"] < 0.1
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("options", [
    {"bits": 2}, {"bits": 3}, {"sym": False}, {"act_order": True}, {"group_size": -1}, {"method": "rtn"},
    {"bits": 3, "sym": False, "act_order": True, "group_size": 64}], ids=str)
def test_every_variant_is_written_and_read_back(tiny_model, tmp_path, options):
    report = job(tiny_model, tmp_path / "out", **options)
    assert report.readback_error == 0
    stated = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert stated["format"] == ("gptq" if options.get("sym", True) else "gptq_v2")


def test_gptq_beats_rounding_on_the_outputs_of_the_model(tiny_model, tmp_path):
    import gptq_belle

    ids = calibration_rows(Calibration(rows=16, seq_len=64, seed=7), tiny_tokenizer(), "bloom").tokens
    exact = gptq_belle.load(tiny_model).logits(ids).log_softmax(-1)
    loss = {}
    for method in ("gptq", "rtn"):
        job(tiny_model, tmp_path / method, bits=3, method=method)
        other = gptq_belle.load(tmp_path / method).logits(ids).log_softmax(-1)
        loss[method] = float((exact.exp() * (exact - other)).sum(-1).mean())
    assert loss["gptq"] < loss["rtn"]


def test_rtn_codes_are_those_of_the_solver(tiny_model, tmp_path):
    job(tiny_model, tmp_path / "out", method="rtn")
    reader = CheckpointReader(tiny_model)
    name = first_linear(reader)
    expected = round_to_nearest(reader.tensor(f"{name}.weight").float(), QuantConfig(group_size=32)).weight
    for ours, theirs in zip(unpack(packed(tmp_path / "out", name), 4), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_repeated_job_writes_the_same_bytes(tiny_bloom, tmp_path):
    for name in ("a", "b"):
        job(tiny_bloom, tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sources_of_other_dtypes(tiny_model, tmp_path, dtype):
    source = changed(tiny_model, tmp_path, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    report = job(source, tmp_path / "out")
    assert report.readback_error == 0


def test_bloom_without_name_prefix_and_tied_head_written_once(tiny_bloom, tmp_path):
    def bare(tensors):
        embedding = tensors["transformer.word_embeddings.weight"]
        return ({k.removeprefix("transformer."): v for k, v in tensors.items()}
                | {"lm_head.weight": embedding.clone()})

    job(changed(tiny_bloom, tmp_path, bare), tmp_path / "out", method="rtn")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert all(name.startswith("transformer.") for name in names)


def test_untied_lm_head_is_kept_although_the_config_says_tied(tiny_bloom, tmp_path):
    head = torch.randn(384, 128).half()
    source = changed(tiny_bloom, tmp_path, lambda tensors: tensors | {"lm_head.weight": head})
    job(source, tmp_path / "out", method="rtn")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_pickled_source_equals_safetensors(tiny_llama, tmp_path):
    source = tmp_path / "bin"
    shutil.copytree(tiny_llama, source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    for name, directory in (("a", tiny_llama), ("b", source)):
        job(directory, tmp_path / name, method="rtn")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def changed(source, tmp_path, edit, config=None):
    """A copy of a model directory with its tensors, or its configuration, edited."""
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    save_file({k: v.contiguous() for k, v in edit(load_file(copy / "model.safetensors")).items()},
              copy / "model.safetensors", metadata={"format": "pt"})
    if config:
        stated = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(stated | config))
    return copy


def with_nan(tensors):
    name = next(name for name in tensors if name.endswith("1.mlp.dense_4h_to_h.weight"))
    tensors[name][3, 5] = float("nan")
    return tensors


def with_huge_bias(tensors):
    tensors = {k: v.float() for k, v in tensors.items()}
    tensors["transformer.ln_f.bias"][0] = 1e6
    return tensors


@pytest.mark.parametrize(("edit", "config", "named"), [
    (with_nan, None, ["transformer.h.1.mlp.dense_4h_to_h.weight", "NaN"]),
    (with_huge_bias, None, ["transformer.ln_f.bias", "1e+06"]),
    (lambda t: {k: v for k, v in t.items() if "ln_f.bias" not in k}, None, ["transformer.ln_f.bias"]),
    (dict, {"model_type": "gpt2"}, ["gpt2"]),
    (dict, {"hidden_size": 256}, ["transformer.word_embeddings.weight", 256]),
    (dict, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["SOURCE"]),
    (dict, {"n_head": "four"}, ["n_head", "four", "config.json"])])
def test_unusable_source_is_refused_and_nothing_is_written(tiny_bloom, tmp_path, edit, config, named):
    source = changed(tiny_bloom, tmp_path, edit, config)
    with pytest.raises(InputError, match=naming(*(source if name == "SOURCE" else name for name in named))):
        job(source, tmp_path / "out", method="rtn")
    assert not (tmp_path / "out").exists()


def test_unsuitable_settings_are_refused_before_any_work(tiny_bloom, tmp_path):
    with pytest.raises(InputError, match=naming("512", "2048")):
        job(tiny_bloom, tmp_path / "out", rows=1)
    assert job(tiny_bloom, tmp_path / "short", rows=1, allow_short=True).calibration["rows"] == 1
    odd = tmp_path / "odd"
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=384, hidden_size=96, intermediate_size=96, num_hidden_layers=1,
                                 num_attention_heads=2)).save_pretrained(odd)
    with pytest.raises(UsageError, match=naming(64, 96, "layers.0.self_attn.q_proj")):
        job(odd, tmp_path / "out", group_size=64)


def test_damaged_output_is_detected_by_verification(tiny_bloom, tmp_path, monkeypatch):
    from gptq_belle.checkpoint.writer import CheckpointWriter

    intact = CheckpointWriter.merge

    def damaging(self):
        intact(self)
        with (self.files / "model.safetensors").open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(size))["transformer.h.0.mlp.dense_4h_to_h.qweight"]
            file.seek(8 + size + entry["data_offsets"][1] - 1)
            last = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([last ^ 0x5a]))

    monkeypatch.setattr(CheckpointWriter, "merge", damaging)
    with pytest.raises(GptqBelleError, match=naming("block 0")):
        job(tiny_bloom, tmp_path / "out", method="rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not (tmp_path / "out.partial" / "files").exists()
    monkeypatch.undo()
    assert job(tiny_bloom, tmp_path / "out", method="rtn").readback_error == 0


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_llama_relatives_are_quantized(kind, tiny_llama, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    import gptq_belle

    config = AutoConfig.for_model(kind, vocab_size=384, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    source = tmp_path / kind
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, source / name)
    report = job(source, tmp_path / "out", bits=8)
    assert report.readback_error == 0
    ids = torch.randint(4, 300, (1, 32))
    exact, ours = (gptq_belle.load(path).logits(ids) for path in (source, tmp_path / "out"))
    assert (exact - ours).abs().max() < 0.05 * exact.abs().max()


MEASURE = """
import sys
from gptq_belle import Calibration
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.common.memory import anonymous_bytes, release_unused
from gptq_belle.quantization.block_quantizer import BlockQuantizer
from gptq_belle.quantization.pipeline import quantize_checkpoint
source, out = sys.argv[1:]
held, run = [], BlockQuantizer.run
def measured(*arguments):
    run(*arguments)
    release_unused()
    held.append(anonymous_bytes())
BlockQuantizer.run = measured
quantize_checkpoint(source, out, QuantConfig(group_size=128),
                    calibration=Calibration(rows=4, seq_len=64, allow_short=True))
print(*held)
"""


def test_memory_does_not_grow_from_block_to_block(tiny_llama, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 384, "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=9, **sizes)).half().save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / file, tmp_path / "model" / file)
    result = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "model", tmp_path / "out"],
                            capture_output=True, text=True, check=True)
    held = [int(count) for count in result.stdout.split()]
    assert len(held) == 9
    packed = 7 * 512 * 512 // 2  # a leaked block in 4 bits would take 0.9 MiB; measured 0.03 MiB per block
    assert held[-1] - held[1] < 7 * packed // 4


def test_bf16_large_values_overflow_is_named(tiny_bloom, tmp_path):
    def huge(tensors):
        tensors = {k: v.to(torch.bfloat16) for k, v in tensors.items()}
        tensors["transformer.word_embeddings.weight"][0, 0] = 1e30
        return tensors

    with pytest.raises(InputError, match=naming("word_embeddings.weight", "1e+30")):
        job(changed(tiny_bloom, tmp_path, huge), tmp_path / "out", method="rtn")


def test_blocks_are_freed_after_use(tiny_model):
    stream = BlockStream(CheckpointReader(tiny_model), torch.device("cpu"))
    stream.release(stream.load_block(0))
    assert all(parameter.is_meta for parameter in stream.model.parameters())


def test_report_file_has_no_local_path(tiny_bloom, tmp_path):
    report = job(tiny_bloom, tmp_path / "out", method="rtn")
    assert report.source == str(tiny_bloom)
    assert json.loads((tmp_path / "out" / "quantization_report.json").read_text())["source"] == tiny_bloom.name
