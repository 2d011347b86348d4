"""A packed head on disk: it equals rounding at load, other readers are rejected, and damage is named."""

import json

import pytest
import torch
from conftest import naming
from safetensors.torch import load_file, save_file

from gptq_belle import hf_model, load
from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.errors import InputError, UsageError
from gptq_belle.formats.packed_lm_head import (
    HEAD_CODES,
    HEAD_SCALES,
    head_group_size,
    pack_head_codes,
    quantize_rows,
    unpack_head_codes,
)
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint

IDS = torch.tensor([[5, 300, 17, 42, 8, 250, 99, 4, 61]])


def quantized(source, out, head_bits):
    quantize_checkpoint(source, out, QuantConfig(group_size=32, method="rtn", head_bits=head_bits))
    return out


def test_bytes_of_packed_codes():
    codes = torch.tensor([[1, 2, 3, 15], [0, 8, 7, 9]], dtype=torch.uint8)
    assert pack_head_codes(codes, 4).tolist() == [[0x21, 0xF3], [0x80, 0x97]]
    assert torch.equal(unpack_head_codes(pack_head_codes(codes, 4), 4), codes)
    assert pack_head_codes(codes, 8) is codes
    assert [head_group_size(width) for width in (4096, 64, 96, 40)] == [128, 64, 32, None]


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_head_equals_rounding_at_load(tiny_model, tmp_path, bits):
    usual, alone = quantized(tiny_model, tmp_path / "usual", 16), quantized(tiny_model, tmp_path / "alone", bits)
    for at_load, stored in ((load(usual, device="cpu", head_bits=bits), load(alone, device="cpu")),):
        assert torch.equal(at_load.logits(IDS), stored.logits(IDS))
        assert (at_load.weight_bytes, at_load.step_bytes) == (stored.weight_bytes, stored.step_bytes)
    names = set(load_file(alone / "model.safetensors"))
    tied = json.loads((alone / "config.json").read_text())["tie_word_embeddings"]
    gone = "transformer.word_embeddings.weight" if tied else "lm_head.weight"
    assert {HEAD_CODES, HEAD_SCALES} <= names
    assert gone not in names
    assert set(load_file(usual / "model.safetensors")) == names - {HEAD_CODES, HEAD_SCALES} | {gone}
    assert (alone / "model.safetensors").stat().st_size < (usual / "model.safetensors").stat().st_size


def test_packed_head_is_named_in_files_and_errors(tiny_bloom, tmp_path):
    path = quantized(tiny_bloom, tmp_path / "alone", 8)
    assert "Only gptq_belle reads these files" in (path / "README.md").read_text()
    assert json.loads((path / "quantize_config.json").read_text())["head_bits"] == 8
    assert not inspect(path).problems
    assert inspect(path).parts["packed head"].bytes == 384 * (128 + 2)
    with pytest.raises(InputError, match=naming(path)):
        hf_model(path, device="cpu")
    with pytest.raises(UsageError, match=naming(path, 8)):
        load(path, device="cpu", head_bits=4)


@pytest.mark.parametrize(("change", "named"), [
    ({HEAD_CODES: torch.zeros(384, 100, dtype=torch.uint8)}, "384 x 128"),
    ({HEAD_CODES: torch.zeros(384, 128)}, "384 x 128"), ({HEAD_SCALES: torch.ones(384, 2).half()}, "384 x 128"),
    ({HEAD_SCALES: torch.full((384, 1), torch.nan).half()}, "NaN"),
    ({"transformer.word_embeddings.weight": torch.ones(384, 128)}, "transformer.word_embeddings.weight")])
def test_damaged_packed_head_is_named(tiny_bloom, tmp_path, change, named):
    path = quantized(tiny_bloom, tmp_path / "alone", 8)
    save_file(load_file(path / "model.safetensors") | change, path / "model.safetensors")
    with pytest.raises(InputError, match=naming(named)):
        load(path, device="cpu")


def test_unsupported_head_bits_are_rejected_and_constant_rows_round():
    with pytest.raises(UsageError, match=naming("head bits", 5)):
        QuantConfig(head_bits=5)
    codes, scales = quantize_rows(torch.ones(2, 32), 8, 32)
    assert (codes == 255).all()
    assert scales.tolist() == [[pytest.approx(1 / 127, rel=1e-3)]] * 2
