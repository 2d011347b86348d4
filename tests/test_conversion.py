"""Conversion of legacy checkpoints and of other tools' directories: same logits, same codes, rejected input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, VOCABULARY, naming, packed_checkpoint, tiny_tokenizer
from decoders import dequantized
from oracle_format import formula
from oracle_legacy import old_weight, write_legacy
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoModelForCausalLM

from gptq_belle.checkpoint.conversion import convert
from gptq_belle.checkpoint.conversion_report import summary_rows
from gptq_belle.checkpoint.decryption import decrypt, encrypt
from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.engine.hf_model import hf_model
from gptq_belle.engine.model import load
from gptq_belle.errors import GptqBelleError, InputError, UsageError
from gptq_belle.formats.zero_points import pack_zeros
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.overrides import parse_override
from gptq_belle.quantization.pipeline import quantize_checkpoint

IDS = torch.tensor([[5, 300, 17, 42, 8, 250, 99, 3, 61], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def config_of(model):
    return json.loads((model / "config.json").read_text())


def legacy(model, folder, **how):
    """A folder like those that BELLE published: a .pt file, configuration and tokenizer."""
    folder.mkdir()
    for name in SMALL:
        shutil.copy(model / name, folder)
    return write_legacy(model, folder / "checkpoint.pt", config_of(model), **how)


def packed_names(state):
    return [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]


def old_logits(model, state, bits, group):
    """Logits of transformers in float32 with the weights of the legacy arithmetic."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name in packed_names(state):
        weight = old_weight(state, name, bits, hf.get_submodule(name).in_features if group == -1 else group)
        hf.get_submodule(name).weight.data = torch.from_numpy(weight)
    with torch.inference_mode():
        return hf(IDS).logits


def written_logits(model, out):
    """Logits of transformers in float32 with the dequantized weights of the written directory."""
    with torch.inference_mode():
        return dequantized(model, out, torch.float32)(IDS).logits


@pytest.mark.parametrize(("bits", "group", "all_positive"), [
    (2, 128, 3), (2, -1, 0), (3, 32, 3), (3, -1, 0), (4, 32, 0), (4, 128, 3), (4, -1, 3), (8, 32, 3), (8, 128, 0)])
def test_logits_equal_the_legacy_arithmetic(tiny_model, tmp_path, bits, group, all_positive):
    state = legacy(tiny_model, tmp_path / "old", bits=bits, group=group, all_positive=all_positive)
    found = convert(tmp_path / "old", tmp_path / "new")
    expected = old_logits(tiny_model, state, bits, group)
    assert torch.equal(written_logits(tiny_model, tmp_path / "new"), expected)
    assert found.deviation == 0
    with torch.inference_mode():
        runtime = hf_model(tmp_path / "new", device="cpu")(IDS).logits
    assert float((runtime - expected).norm() / expected.norm()) < 2e-4
    assert (found.bits, found.linears) == (bits, len(packed_names(state)))
    assert (found.read_format, found.written_format) == ("gptq", "gptq" if all_positive else "gptq_v2")
    assert (found.wrapped_zeros > 0) == (all_positive > 0)
    assert inspect(tmp_path / "new").problems == []


@pytest.mark.parametrize("group", [32, 128])
def test_codes_and_zero_points_are_unchanged(tiny_model, tmp_path, group):
    state = legacy(tiny_model, tmp_path / "old", bits=4, group=group)
    convert(tmp_path / "old" / "checkpoint.pt", tmp_path / "new")
    new = load_file(tmp_path / "new" / "model.safetensors")
    for name in packed_names(state):
        assert torch.equal(new[f"{name}.qweight"], state[f"{name}.qweight"])
        assert torch.equal(new[f"{name}.scales"].float(), state[f"{name}.scales"])
        old = state[f"{name}.qzeros"].numpy().view(np.uint32)
        v2 = new[f"{name}.qzeros"].numpy().view(np.uint32)
        for nibble in range(8):
            assert (((v2 >> 4 * nibble) & 15) == ((old >> 4 * nibble) & 15) + 1).all()
        assert new[f"{name}.g_idx"].tolist() == [k // group for k in range(len(new[f"{name}.g_idx"]))]


def test_one_group_per_output_channel_is_group_size_minus_1(tiny_llama, tmp_path):
    legacy(tiny_llama, tmp_path / "old", bits=4, group=-1)
    assert convert(tmp_path / "old", tmp_path / "new").group_size == -1
    legacy(tiny_llama, tmp_path / "old128", bits=4, group=128)  # down_proj has 256 inputs
    assert convert(tmp_path / "old128", tmp_path / "new128").group_size == 128


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wrapped_zero_points_are_repaired_on_request(tiny_model, tmp_path, bits):
    state = legacy(tiny_model, tmp_path / "old", bits=bits, group=32, all_positive=2)
    found = convert(tmp_path / "old", tmp_path / "new", repair_zeros=True)
    assert found.written_format == "gptq_v2"
    new = load_file(tmp_path / "new" / "model.safetensors")
    wrapped = 0
    for name in packed_names(state):
        weight = old_weight(state, name, bits, 32)
        parts = [new[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
        ours, scales = formula(*parts, bits, v1=False).numpy(), state[f"{name}.scales"].t().double().numpy()
        mended = ~np.isclose(ours, weight, rtol=0, atol=1e-12)
        assert mended[2].all()  # an all-positive output
        assert (ours[2] >= 0).all()
        lift = (ours - weight)[mended] / scales.repeat(32, axis=1)[mended]
        np.testing.assert_allclose(lift, 2**bits, rtol=1e-6)
        wrapped += int(mended[:, ::32].sum())
    assert found.repaired_zeros == found.wrapped_zeros == wrapped
    assert 0 < found.overwritten_zeros < wrapped
    with pytest.raises(InputError, match=naming("gptq", 0)):
        convert(tmp_path / "old", tmp_path / "other", repair_zeros=True, checkpoint_format="gptq")
    with pytest.raises(InputError, match=naming("gptq_v2")):
        convert(tmp_path / "old", tmp_path / "other", checkpoint_format="gptq_v2")


def test_scales_of_float32_are_rounded_once(tiny_llama, tmp_path):
    state = legacy(tiny_llama, tmp_path / "old", bits=4, group=32)
    for name in packed_names(state):
        state[f"{name}.scales"] *= 1 + torch.rand_like(state[f"{name}.scales"]) * 2**-10
    torch.save(state, tmp_path / "old" / "checkpoint.pt")
    found = convert(tmp_path / "old", tmp_path / "new")
    assert 0 < found.deviation <= 2**-11
    new = load_file(tmp_path / "new" / "model.safetensors")
    name = packed_names(state)[0]
    assert torch.equal(new[f"{name}.scales"], state[f"{name}.scales"].half())


def damaged(model, folder, change, **how):
    state = legacy(model, folder, bits=4, group=32, **how)
    change(state, packed_names(state)[0])
    torch.save(state, folder / "checkpoint.pt")
    return folder


def too_large(state, name):
    state[f"{name}.scales"][0, 0] = 70000.0


def too_small(state, name):
    state[f"{name}.scales"][0, 0] = 1e-9


def not_finite(state, name):
    state[f"{name}.scales"][0, 0] = torch.nan


def extra(state, name):
    state["model.nonsense.weight"] = torch.zeros(3)


def halved(state, name):
    state[f"{name}.qweight"] = state[f"{name}.qweight"][::2].clone()


def other_groups(state, name):
    state[f"{name}.scales"] = state[f"{name}.scales"][:1].clone()


def older(state, name):
    for key in list(state):
        if key.endswith(("qweight", "qzeros", "scales")):
            del state[key]
    state[f"{name}.zeros"] = torch.zeros(128, 1)


@pytest.mark.parametrize(("change", "named"), [
    (too_large, ["scales", "7e+04", 65504]), (not_finite, ["scales", "NaN"]), (extra, ["model.nonsense.weight"]),
    (halved, ["qzeros", torch.int32]), (other_groups, ["group size"]), (older, ["zeros"]),
])
def test_damaged_legacy_checkpoint_is_refused(tiny_llama, tmp_path, change, named):
    with pytest.raises(InputError, match=naming(*named)):
        convert(damaged(tiny_llama, tmp_path / "old", change), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.partial").exists()


def test_underflowing_scales_are_counted(tiny_llama, tmp_path):
    assert convert(damaged(tiny_llama, tmp_path / "old", too_small), tmp_path / "new").vanished_scales == 1


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_pickle_that_runs_code_is_refused(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = legacy(tiny_llama, tmp_path / "old", bits=4, group=32)
    torch.save(state | {"evil": Hostile()}, tmp_path / "old" / "checkpoint.pt")
    with pytest.raises(InputError, match=naming("checkpoint.pt")):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "touched").exists()


def test_config_and_tokenizer_come_from_the_base(tiny_bloom, tmp_path):
    state = write_legacy(tiny_bloom, tmp_path / "only.pt", config_of(tiny_bloom), bits=4, group=32)
    with pytest.raises(InputError, match=naming("config.json", "only.pt")):
        convert(tmp_path / "only.pt", tmp_path / "new")
    found = convert(tmp_path / "only.pt", tmp_path / "new", base=tiny_bloom)
    assert found.tied
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert config_of(tmp_path / "new")["tie_word_embeddings"] is True
    assert "lm_head.weight" in state
    assert load(tmp_path / "new", device="cpu").generate("你好", max_new_tokens=3) is not None


@pytest.mark.parametrize("base", ["nowhere", "empty"])
def test_base_without_a_model_is_refused(tiny_bloom, tmp_path, base):
    (tmp_path / "empty").mkdir()
    legacy(tiny_bloom, tmp_path / "old", bits=4, group=32)
    with pytest.raises(InputError, match=naming(tmp_path / base)):
        convert(tmp_path / "old" / "checkpoint.pt", tmp_path / "new", base=tmp_path / base)


@pytest.mark.parametrize("stated_in", ["config.json", "quantize_config.json"])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_single_file_of_a_directory_is_read_with_its_config(tiny_model, tmp_path, checkpoint_format, stated_in):
    """A file of a directory is not a legacy state dictionary, whose zero points are all stored minus one."""
    source = packed_checkpoint(tiny_model, tmp_path / "source", sym=False, checkpoint_format=checkpoint_format)
    if stated_in == "config.json":
        (source / "quantize_config.json").unlink()
    else:
        config = config_of(source)
        del config["quantization_config"]
        (source / "config.json").write_text(json.dumps(config))
    found = convert(source / "model.safetensors", tmp_path / "new")
    assert (found.kind, found.read_format, found.written_format) == ("GPTQ directory", checkpoint_format, "gptq_v2")
    assert torch.equal(hf_model(tmp_path / "new", device="cpu")(IDS).logits, hf_model(source, device="cpu")(IDS).logits)


def test_legacy_safetensors_file_without_configuration_is_converted(tiny_llama, tmp_path):
    state = legacy(tiny_llama, tmp_path / "old", bits=4, group=32)
    (tmp_path / "old" / "checkpoint.pt").unlink()
    save_file(state, tmp_path / "old" / "checkpoint.safetensors")
    found = convert(tmp_path / "old" / "checkpoint.safetensors", tmp_path / "new")
    assert (found.kind, found.read_format, found.written_format) == ("state dictionary", "gptq", "gptq_v2")
    assert torch.equal(written_logits(tiny_llama, tmp_path / "new"), old_logits(tiny_llama, state, 4, 32))


def test_untied_lm_head_is_kept(tiny_bloom, tmp_path):
    state = legacy(tiny_bloom, tmp_path / "old", bits=4, group=32)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, tmp_path / "old" / "checkpoint.pt")
    assert not convert(tmp_path / "old", tmp_path / "new").tied
    assert torch.equal(load_file(tmp_path / "new" / "model.safetensors")["lm_head.weight"],
                       state["lm_head.weight"].half())
    assert config_of(tmp_path / "new")["tie_word_embeddings"] is False


def test_zero_biases_of_layers_without_bias_are_dropped(tiny_llama, tmp_path):
    state = legacy(tiny_llama, tmp_path / "old", bits=4, group=32)
    found = convert(tmp_path / "old", tmp_path / "new")
    assert found.dropped_biases == found.linears
    assert not [key for key in load_file(tmp_path / "new" / "model.safetensors") if key.endswith("bias")]
    name = packed_names(state)[0]
    state[f"{name}.bias"][3] = 0.5
    torch.save(state, tmp_path / "old" / "checkpoint.pt")
    with pytest.raises(InputError, match=naming(f"{name}.bias")):
        convert(tmp_path / "old", tmp_path / "other")


def test_several_checkpoints_and_unknown_formats_are_refused(tiny_llama, tmp_path):
    legacy(tiny_llama, tmp_path / "old", bits=4, group=32)
    shutil.copy(tmp_path / "old" / "checkpoint.pt", tmp_path / "old" / "other.pt")
    with pytest.raises(UsageError, match=naming(tmp_path / "old", 2)):
        convert(tmp_path / "old", tmp_path / "new")
    with pytest.raises(UsageError, match=naming("v3")):
        convert(tmp_path / "old", tmp_path / "new", checkpoint_format="v3")
    with pytest.raises(InputError, match=naming(tiny_llama)):
        convert(tiny_llama, tmp_path / "new")
    with pytest.raises(InputError, match=naming(tmp_path / "nowhere")):
        convert(tmp_path / "nowhere", tmp_path / "new")


def foreign(path, producer):
    """Make a directory of gptq_belle look like that of another tool."""
    settings = json.loads((path / "quantize_config.json").read_text()) | {"meta": {"quantizer": [producer]}}
    (path / "quantize_config.json").write_text(json.dumps(settings))
    config = config_of(path) | {"quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config))
    return path


def auto_gptq(path):
    """A directory as AutoGPTQ writes it with use_safetensors=False: a .bin file, no quantization in config.json."""
    torch.save(load_file(path / "model.safetensors"), path / "gptq_model-4bit-32g.bin")
    (path / "model.safetensors").unlink()
    settings = json.loads((path / "quantize_config.json").read_text())
    kept = {key: settings[key] for key in ("bits", "group_size", "desc_act", "sym", "damp_percent", "true_sequential")}
    (path / "quantize_config.json").write_text(json.dumps(kept))
    config = config_of(path)
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("how", [{}, {"act_order": True}, {"bits": 8}, {"bits": 3, "act_order": True}])
def test_directories_of_other_tools_round_trip(tiny_model, tmp_path, how):
    source = foreign(packed_checkpoint(tiny_model, tmp_path / "source", **how), "gptqmodel:7.0.0")
    there = convert(source, tmp_path / "v2", checkpoint_format="gptq_v2")
    back = convert(tmp_path / "v2", tmp_path / "v1", checkpoint_format="gptq")
    assert (there.read_format, there.written_format, back.read_format) == ("gptq", "gptq_v2", "gptq_v2")
    assert there.symmetric
    assert there.act_order == how.get("act_order", False)
    first, second, last = (load_file(path / "model.safetensors") for path in (source, tmp_path / "v2", tmp_path / "v1"))
    assert first.keys() == last.keys()
    assert all(torch.equal(tensor, last[name]) for name, tensor in first.items())
    assert not any(torch.equal(first[f"{name}.qzeros"], second[f"{name}.qzeros"]) for name in packed_names(first))
    assert torch.equal(hf_model(source, device="cpu")(IDS).logits, hf_model(tmp_path / "v2", device="cpu")(IDS).logits)
    assert config_of(tmp_path / "v1")["quantization_config"]["meta"]["quantizer"][0].startswith("gptq_belle:")


def test_mixed_bit_directories_round_trip(tiny_model, tmp_path):
    """`dynamic` states other bits and groups for some linears, and excludes others."""
    texts = ("down_proj|dense_4h_to_h=bits:8,group_size:64", "o_proj|self_attention.dense=skip")
    rules = tuple(map(parse_override, texts))
    quantize_checkpoint(tiny_model, tmp_path / "mixed", QuantConfig(group_size=32, method="rtn", overrides=rules))
    source = foreign(tmp_path / "mixed", "gptqmodel:7.0.0")
    found = convert(source, tmp_path / "v2", checkpoint_format="gptq_v2")
    assert (found.bits, found.group_size, found.mixed) == (4, 32, 2)  # one in each of two blocks
    convert(tmp_path / "v2", tmp_path / "v1", checkpoint_format="gptq")
    first, last = (load_file(path / "model.safetensors") for path in (source, tmp_path / "v1"))
    assert first.keys() == last.keys()
    assert all(torch.equal(tensor, last[name]) for name, tensor in first.items())
    assert torch.equal(hf_model(source, device="cpu")(IDS).logits, hf_model(tmp_path / "v2", device="cpu")(IDS).logits)
    dynamic = config_of(source)["quantization_config"]["dynamic"]
    assert len(dynamic) == 2
    assert config_of(tmp_path / "v1")["quantization_config"]["dynamic"] == dynamic


def test_linear_packed_against_its_dynamic_rule_is_refused(tiny_llama, tmp_path):
    source = packed_checkpoint(tiny_llama, tmp_path / "source")
    config = config_of(source)
    config["quantization_config"]["dynamic"] = {r"-:.*down_proj": {}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=naming("dynamic", "mlp.down_proj")):
        convert(source, tmp_path / "new")


def test_bin_file_of_auto_gptq_is_converted(tiny_model, tmp_path):
    source = packed_checkpoint(tiny_model, tmp_path / "source", bits=4, sym=True)
    expected = load_file(source / "model.safetensors")
    convert(auto_gptq(source), tmp_path / "new")
    assert all(torch.equal(tensor, expected[name])
               for name, tensor in load_file(tmp_path / "new" / "model.safetensors").items())


def test_asymmetric_v1_is_written_as_v2_with_the_tokenizer_of_the_base(tiny_llama, tmp_path):
    source = foreign(packed_checkpoint(tiny_llama, tmp_path / "source", sym=False, checkpoint_format="gptq"), "x:1")
    for file in source.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="tokenizer"):
        convert(source, tmp_path / "new")
    found = convert(source, tmp_path / "new", base=tiny_llama)
    assert (found.symmetric, found.written_format) == (False, "gptq_v2")
    assert (tmp_path / "new" / "tokenizer.json").is_file()


def test_progress_ends_at_the_total(tiny_model, tmp_path):
    seen = []
    legacy(tiny_model, tmp_path / "old", bits=4, group=32)
    convert(tmp_path / "old", tmp_path / "new", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (seen[-1][1], seen[-1][1])


def test_wrong_packed_word_is_found_before_publishing(tiny_llama, tmp_path, monkeypatch):
    legacy(tiny_llama, tmp_path / "old", bits=4, group=32)
    monkeypatch.setattr("gptq_belle.checkpoint.conversion.pack_zeros",
                        lambda zeros, bits, to: pack_zeros(zeros, bits, to) ^ 16)
    with pytest.raises(GptqBelleError, match=naming("model.layers.0.mlp.down_proj")):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def published_tokenizer(folder):
    """Replace the tokenizer by one like BELLE-LLaMA's: SentencePiece only, with empty special tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES[:3]), model_prefix=str(folder / "tokenizer"),
                               vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
                               normalization_rule_name="identity", character_coverage=0.98, minloglevel=2,
                               remove_extra_whitespaces=False)  # as LLaMA's
    (folder / "tokenizer.vocab").unlink()
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "", "eos_token": "", "model_max_length": 1000000000000000019884624838656, '
        '"tokenizer_class": "LlamaTokenizer", "unk_token": ""}')  # byte for byte the published one


WRONG_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}  # of LLaMA's first conversions
RIGHT_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def published_ids(folder):
    """State the special token ids of conversions of early 2023."""
    changed = config_of(folder) | WRONG_IDS | {"architectures": ["LLaMAForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(changed))
    (folder / "generation_config.json").write_text(json.dumps(WRONG_IDS | {"_from_model_config": True}))


def test_wrong_special_token_ids_are_corrected_in_legacy_checkpoints_only(tiny_llama, tmp_path):
    legacy(tiny_llama, tmp_path / "old", bits=4, group=32)
    assert convert(tmp_path / "old", tmp_path / "right").corrected_ids == {}
    published_ids(tmp_path / "old")
    right = config_of(tiny_llama) | {"pad_token_id": tiny_tokenizer().pad_token_id}
    found = convert(tmp_path / "old", tmp_path / "new")
    assert found.corrected_ids == {key: right[key] for key in WRONG_IDS}
    assert any("eos_token_id 2" in value for _, value in summary_rows(found))
    for path in (tmp_path / "new" / "config.json", tmp_path / "new" / "generation_config.json"):
        written = json.loads(path.read_text())
        assert {key: written[key] for key in WRONG_IDS} == found.corrected_ids
    source = packed_checkpoint(tiny_llama, tmp_path / "packed")
    (source / "config.json").write_text(json.dumps(config_of(source) | {"eos_token_id": 1}))
    assert convert(source, tmp_path / "kept").corrected_ids == {}
    assert config_of(tmp_path / "kept")["eos_token_id"] == 1


def test_conversion_of_a_published_legacy_folder(tiny_llama, tmp_path):
    """A LLaMA .pt file published like BELLE's: encrypt, decrypt, convert, generate."""
    state = legacy(tiny_llama, tmp_path / "plain", bits=4, group=32)
    published_tokenizer(tmp_path / "plain")
    published_ids(tmp_path / "plain")
    key = tmp_path / "consolidated.00.pth"
    key.write_bytes(np.random.default_rng(0).bytes(100_000))
    encrypt(tmp_path / "plain", tmp_path / "enc", key)
    assert all(path.suffix == ".enc" for path in (tmp_path / "enc").iterdir())
    assert (tmp_path / "enc" / "tokenizer_config.json."
            "ef7ef410b9b909949e96f172b17cbf7c68b11761c632715fa05a6088c0c2b9ac.enc").is_file()  # the published name
    decrypt(tmp_path / "enc", tmp_path / "dec", key)
    convert(tmp_path / "dec", tmp_path / "new")
    pieces = SentencePieceProcessor(str(tmp_path / "dec" / "tokenizer.model"))
    ids = torch.tensor([[1, *pieces.encode("Human: 你好 \n\nAssistant: ")]])
    old = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name in packed_names(state):
        old.get_submodule(name).weight.data = torch.from_numpy(old_weight(state, name, 4, 32))
    expected = old.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:].tolist()
    assert RIGHT_IDS.items() <= config_of(tmp_path / "new").items()
    model = load(tmp_path / "new", device="cpu")
    assert model.prompt_style == "llama"
    answer = model.generate("你好", prompt_style="auto", max_new_tokens=12)
    assert answer == model.tokenizer.decode(expected, skip_special_tokens=True)
    assert model.tokenizer.eos_token == "</s>"
    (tmp_path / "new" / "tokenizer.model").unlink()  # tokenizer.json is enough
    assert load(tmp_path / "new", device="cpu").generate("你好", prompt_style="auto", max_new_tokens=12) == answer
