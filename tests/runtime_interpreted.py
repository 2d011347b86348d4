"""Answers of the CUDA path, whose Triton kernels are interpreted, against those of the CPU.

`test_cuda_runtime.py` runs this file in a separate process: TRITON_INTERPRET has to be set before Triton is imported.
"""

import bfloat16_interpreter
import pytest
import torch
from conftest import packed_checkpoint
from launch_counter import CUDA, simulate

import gptq_belle
from gptq_belle.bench.self_test import self_test
from gptq_belle.engine.batching import Engine

bfloat16_interpreter.teach()
IDS = torch.arange(4, 30)


def one_block(path, device, **options):
    """The first block of a model: the interpreter takes tenths of seconds per launch."""
    model = gptq_belle.load(path, device=device, **options)
    del model.decoder.blocks[1:]
    return model


# The allowed error of logits relative to their norm: three times that of the rounding of activations and cache.
@pytest.mark.parametrize(("kind", "dtype", "cache", "allowed"), [
    ("bloom", torch.float16, "float16", 2.5e-3), ("llama", torch.bfloat16, "int8", 4.5e-2)])
def test_logits(kind, dtype, cache, allowed, request, tmp_path, monkeypatch):
    path = packed_checkpoint(request.getfixturevalue(f"tiny_{kind}"), tmp_path / "packed", act_order=kind == "llama")
    with simulate(monkeypatch) as gpu:
        model = one_block(path, "cuda:0", dtype=dtype, cache=cache)
        logits, batch = model.prefill(IDS[None], 2)
        found = torch.cat((logits, model.decode(torch.tensor([7]), batch))).cpu()
    assert gpu.counts["kernel", "skinny_kernel"] >= 8
    model = one_block(path, "cpu", cache="float32")
    logits, batch = model.prefill(IDS[None], 2)
    expected = torch.cat((logits, model.decode(torch.tensor([7]), batch)))
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1) < allowed).all()


def test_self_test(monkeypatch):
    with simulate(monkeypatch) as gpu:
        checks = self_test([CUDA])
    assert [check for check in checks if not check.passed] == []
    assert {check.kernel for check in checks} == {"triton"}
    assert gpu.counts.total("kernel") == 12


def answers(model):
    """Of a batch of two prompts of different lengths."""
    engine = Engine(model, 2, 40)
    requests = [engine.submit(ids, gptq_belle.SamplingParams(max_new_tokens=2, ignore_eos=True))
                for ids in (range(4, 20), range(30, 41))]
    while not engine.idle:
        engine.step()
    return [request.answer for request in requests]


def test_answers_of_a_batch(tiny_llama, tmp_path, monkeypatch):
    path = packed_checkpoint(tiny_llama, tmp_path / "packed")
    with simulate(monkeypatch):
        found = answers(gptq_belle.load(path, device="cuda:0"))
    assert found == answers(gptq_belle.load(path, device="cpu"))
