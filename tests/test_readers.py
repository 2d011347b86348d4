"""The table of readers, `quantize --for`, and the claims of model cards."""

import json
import re
from dataclasses import asdict

import pytest
from conftest import packed_checkpoint
from safetensors.torch import load_file

from gptq_belle import Calibration, QuantConfig, load, quantize_checkpoint
from gptq_belle.checkpoint.conversion import convert
from gptq_belle.errors import UsageError
from gptq_belle.formats.readers import KINDS, READERS, TARGETS, kinds_of, obstacle, takers
from gptq_belle.models.belle_catalogue import CONFIGS
from gptq_belle.models.dimensions import dimensions
from gptq_belle.quantization.overrides import parse_override
from gptq_belle.quantization.reader_settings import settings_for_reader

SHORT = Calibration(rows=8, seq_len=32, allow_short=True)
MODEL = {"bloom": dimensions(CONFIGS["belle-7b"]), "llama": dimensions(CONFIGS["llama-7b"])}


def test_targets_have_a_verdict_on_every_kind_and_every_refusal_a_reason():
    for name in {reader for readers in TARGETS.values() for reader in readers} | {"vLLM on a CPU"}:
        assert READERS[name].verdicts.keys() == KINDS.keys()
    for reader in READERS.values():
        assert reader.verdicts.keys() <= KINDS.keys()
        assert all(verdict.takes or verdict.why for verdict in reader.verdicts.values())


@pytest.mark.parametrize(("architecture", "settings", "kinds"), [
    ("llama", {}, ["4 bit"]), ("bloom", {}, ["4 bit", "BLOOM"]), ("llama", {"bits": 3}, ["3 bit"]),
    ("bloom", {"overrides": ("query_key_value=skip",)}, ["4 bit", "skip"]),
    ("llama", {"overrides": ("down_proj=bits:8",)}, ["4 bit", "8 bit", "dynamic"]),
    ("llama", {"overrides": ("down_proj=sym:false",)}, ["4 bit", "asymmetric", "dynamic"]),
    ("llama", {"sym": False, "act_order": True, "head_bits": 8}, ["4 bit", "asymmetric", "act-order", "packed head"]),
    ("llama", {"auto_bits": "4.5"}, ["4 bit", "dynamic"])])
def test_kinds_follow_from_the_settings(architecture, settings, kinds):
    overrides = tuple(map(parse_override, settings.get("overrides", ())))
    assert kinds_of(asdict(QuantConfig(**settings | {"overrides": overrides})), architecture, alike=True) == kinds


@pytest.mark.parametrize("reader", TARGETS)
@pytest.mark.parametrize("architecture", MODEL)
def test_chosen_settings_are_read_by_the_named_readers(architecture, reader):
    config, notes = settings_for_reader(QuantConfig(reader=reader), MODEL[architecture])
    kinds = kinds_of(asdict(config), architecture, alike=True)
    assert all(READERS[name] in takers(kinds) for name in TARGETS[reader])
    left = architecture == "bloom" and reader in ("vllm", "any")
    assert [override.skip for override in config.overrides] == [True] * left
    assert any("2.3 GB" in note for note in notes) == left  # 30 blocks of 4096 x 12288 weights, 12 bits more each


CONFLICTS = [("vllm", "act-order", {"act_order": True}), ("vllm", "asymmetric", {"sym": False}),
             ("vllm", "3 bit", {"bits": 3}), ("vllm", "2 bit", {"bits": 2}),
             ("vllm", "packed head", {"head_bits": 8}), ("vllm", "2 bit", {"overrides": ("down_proj=bits:2",)}),
             ("transformers", "dynamic", {"auto_bits": "4.5"}), ("transformers", "packed head", {"head_bits": 4}),
             ("transformers", "dynamic", {"overrides": ("down_proj=bits:8",)}), ("llama.cpp", "3 bit", {"bits": 3}),
             ("llama.cpp", "dynamic", {"auto_bits": "4.5"}), ("any", "act-order", {"act_order": True})]


@pytest.mark.parametrize(("reader", "kind", "settings"), CONFLICTS)
def test_options_that_a_reader_does_not_read_are_refused_with_the_reason(reader, kind, settings):
    overrides = tuple(map(parse_override, settings.get("overrides", ())))
    with pytest.raises(UsageError) as caught:
        settings_for_reader(QuantConfig(**settings | {"overrides": overrides, "reader": reader}), MODEL["llama"])
    reasons = [READERS[name].verdicts[kind].why for name in TARGETS[reader]]
    assert any(why and why in caught.value.cause for why in reasons)


def test_override_of_query_key_value_conflicts_with_vllm():
    config = QuantConfig(overrides=(parse_override("query_key_value=bits:8"),), reader="vllm")
    with pytest.raises(UsageError):
        settings_for_reader(config, MODEL["bloom"])


def test_eight_bits_for_vllm_are_noted_to_need_a_gpu():
    assert settings_for_reader(QuantConfig(bits=8, reader="vllm"), MODEL["llama"])[1]
    assert not settings_for_reader(QuantConfig(reader="vllm"), MODEL["llama"])[1]


def test_bloom_for_any_reader_is_written_with_the_key_that_transformers_reads(tiny_bloom, tmp_path):
    report = quantize_checkpoint(tiny_bloom, tmp_path / "out", QuantConfig(group_size=32, reader="any"),
                                 calibration=SHORT)
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["modules_in_block_to_quantize"] == [["self_attention.dense"], ["mlp.dense_h_to_4h"],
                                                      ["mlp.dense_4h_to_h"]]
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "transformer.h.0.self_attention.query_key_value.weight" in names
    assert "transformer.h.1.self_attention.dense.qweight" in names
    assert any("query_key_value" in note for note in report.notes)
    assert load(tmp_path / "out", device="cpu").generate("a", max_new_tokens=2) is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(READERS[name].name in card.split("refuse or misread")[0] for name in TARGETS["any"])


@pytest.mark.parametrize(("settings", "overrides"), [
    ({}, ()), ({"act_order": True}, ()), ({"head_bits": 8}, ()), ({}, ("down_proj=bits:8",)),
    ({}, (r"layers\.0\..*o_proj=skip",))])
def test_card_names_readers_and_refusals(tiny_llama, tmp_path, settings, overrides):
    config = QuantConfig(group_size=32, method="rtn", overrides=tuple(map(parse_override, overrides)), **settings)
    quantize_checkpoint(tiny_llama, tmp_path / "out", config)
    card, kinds = (tmp_path / "out" / "README.md").read_text(), kinds_of(asdict(config), "llama", alike=False)
    listed = dict(re.findall(r"^- (.+?)(?: \([^)]*\))?((?:: |, ).*)?$", card.split("## Use")[1], re.MULTILINE))
    for reader in READERS.values():
        why = obstacle(reader, kinds)
        assert (reader.name in listed) == (why is not None or reader in takers(kinds))
        assert why is None or listed[reader.name] == f": {why}"
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "modules_in_block_to_quantize" not in stated


def test_card_of_a_converted_model_names_readers(tiny_llama, tmp_path):
    convert(packed_checkpoint(tiny_llama, tmp_path / "packed", sym=False), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "GPTQModel" in card.split("refuse or misread")[0]
    assert "vLLM" in card.split("refuse or misread")[1]


def test_command_refuses_a_conflict_and_its_help_names_readers_that_refuse_act_order(belle, tiny_llama, tmp_path):
    code, _, error = belle("quantize", tiny_llama, tmp_path / "out", "--for", "vllm", "--act-order", "--group-size", 32)
    assert code == 2
    assert READERS["vllm"].verdicts["act-order"].why in " ".join(error.split())
    assert not (tmp_path / "out").exists()
    text = " ".join(belle("quantize", "--help")[1].split())
    for name in ("vLLM", "OpenVINO"):
        assert name in text.split("--act-order")[1].split("--damp")[0]
