"""make_model: directories of random weights that the loader takes, of the right size, with activations in bounds."""

import json
import sys
from pathlib import Path

import pytest
import torch

from gptq_belle import hf_model, load
from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.checkpoint.packed_reader import packed_lm_head_bits
from gptq_belle.checkpoint.reader import CheckpointReader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import make_model

SMALL = {
    "bloom": {"model_type": "bloom", "vocab_size": 640, "hidden_size": 256, "n_layer": 3, "n_head": 4,
              "seq_length": 128, "tie_word_embeddings": True, "architectures": ["BloomForCausalLM"]},
    "qwen2": {"model_type": "qwen2", "vocab_size": 640, "hidden_size": 256, "num_hidden_layers": 3,
              "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2,
              "max_position_embeddings": 128, "tie_word_embeddings": False, "architectures": ["Qwen2ForCausalLM"]},
}


@pytest.fixture(params=SMALL)
def config(request, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL[request.param]))
    return path


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_made_model_loads_and_its_activations_fit_into_float16(config, tmp_path, bits):
    make_model.make(config, tmp_path / "out", bits=bits, layers=2)
    hf = hf_model(tmp_path / "out", device="cpu")
    model = load(tmp_path / "out", device="cpu", head_bits=16)  # as transformers has it
    assert len(hf.get_submodule(CheckpointReader(tmp_path / "out").arch.blocks)) == 2
    ids = torch.randint(640, (2, 16))
    seen = []
    for module in hf.modules():
        module.register_forward_hook(lambda module, args, out: seen.append(out) if torch.is_tensor(out) else None)
    logits = hf(input_ids=ids).logits
    torch.testing.assert_close(model.logits(ids), logits, rtol=1e-3, atol=1e-3)
    largest = max(float(tensor.abs().max()) for tensor in seen)
    assert 1 < largest < 1000
    assert len(set(logits.argmax(-1).flatten().tolist())) > 8  # rows that differ, not one vector for all
    if bits != 16:
        found = inspect(tmp_path / "out")
        assert found.quantization.bits == bits
        assert all("tokenizer" in problem for problem in found.problems)


def test_outputs_of_linears_are_as_large_as_their_inputs(config, tmp_path):
    make_model.make(config, tmp_path / "out", bits=4)
    model, ratios = hf_model(tmp_path / "out", device="cpu"), []
    for name, module in model.named_modules():
        if name.endswith((".query_key_value", ".q_proj", ".gate_proj", ".dense_h_to_4h")):
            module.register_forward_hook(lambda module, args, out: ratios.append(float(out.std() / args[0].std())))
    model(input_ids=torch.randint(640, (2, 64)))
    assert min(ratios) > 0.7
    assert max(ratios) < 1.4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_head_is_read_from_where_it_is_stored(config, tmp_path, bits):
    out = tmp_path / "out"
    whole, packed = make_model.make(config, out, bits=4), make_model.make(config, out, bits=4, head_bits=bits)
    shape = json.loads(config.read_text())
    assert whole - packed == pytest.approx(640 * shape["hidden_size"] * (2 - bits / 8 - 2 / 128), abs=500)
    assert packed_lm_head_bits(CheckpointReader(out), 640, shape["hidden_size"]) == bits
    model = load(out, device="cpu")
    logits = model.logits(torch.randint(640, (2, 16)))
    assert len(set(logits.argmax(-1).flatten().tolist())) > 8


def test_shards_are_cut_by_size_and_a_second_run_leaves_nothing_of_the_first(config, tmp_path):
    out = tmp_path / "out"
    size = make_model.make(config, out, bits=8, shard_bytes=500_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 500_000 + 20_000 for file in files)  # headers are on top
    assert sum(file.stat().st_size for file in files) == size
    assert load(out, device="cpu").logits(torch.ones(1, 4, dtype=torch.int64)).isfinite().all()
    make_model.make(config, out, bits=8)
    assert [file.name for file in out.glob("model*")] == ["model.safetensors"]


def test_the_same_seed_gives_the_same_bytes(config, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_model.make(config, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
