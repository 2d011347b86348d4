"""Accumulated Hessians and held-out rows against inputs captured from whole models in transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.quantization.activations import InMemoryActivations
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.stage_hessians import OriginalWeights, accumulate_hessians, held_out_rows

ROWS, LENGTH, SEEN = 8, 24, 6


def captured(model, name, ids):
    """The input (rows, T, K) of a linear, in float64."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
    model(ids)
    hook.remove()
    return found[0].double()


@pytest.mark.parametrize("max_rows", [None, 1, 3])
@pytest.mark.parametrize("targets", [True, False])
def test_hessians_and_held_out_rows_equal_those_of_whole_models(tiny_model, targets, max_rows):
    """Block 0 with its first linear changed, so that the two models differ after it."""
    stream = BlockStream(CheckpointReader(tiny_model), torch.device("cpu"))
    stream.max_rows = max_rows
    ids = torch.randint(4, 300, (ROWS, LENGTH))
    batches = [part for batch in stream.embed(ids) for part in batch.split(5)]
    block, stage = stream.load_block(0), stream.arch.stages[-1]
    name = f"{stream.arch.linears[0]}.weight"
    original = block.get_parameter(name).data
    originals = OriginalWeights()
    originals.weights[name] = original
    block.get_parameter(name).data = changed = original + 0.05 * torch.randn_like(original)
    steps = []
    rows, full = InMemoryActivations(*batches), (originals, InMemoryActivations(*batches)) if targets else None
    found = accumulate_hessians(stream, block, stage, rows, full, SEEN, lambda: steps.append(1))
    again = accumulate_hessians(stream, block, stage, rows, full, SEEN, lambda: None)  # recorded
    assert torch.equal(again.hessian, found.hessian)
    assert not targets or torch.equal(again.cross, found.cross)
    assert block.get_parameter(name).data_ptr() == changed.data_ptr()
    assert originals.weights[name].data_ptr() == original.data_ptr()
    assert len(steps) == len(batches)

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    at = f"{stream.arch.blocks}.0.{stage[0]}"
    f = captured(model, at, ids)
    model.get_parameter(f"{stream.arch.blocks}.0.{name}").data = changed
    x = captured(model, at, ids)
    seen, gap = x[:SEEN].flatten(0, 1), (f - x)[:SEEN].flatten(0, 1)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.hessian.double(), seen.t() @ seen / len(seen), **close)
    held_x, held_f = (torch.cat(parts).double() for parts in zip(*found.held_out, strict=True))
    torch.testing.assert_close(held_x, x[SEEN:].flatten(0, 1), **close)
    torch.testing.assert_close(held_f, (f if targets else x)[SEEN:].flatten(0, 1), **close)
    if targets:
        assert gap.abs().max() > 0.01
        torch.testing.assert_close(found.cross.double(), gap.t() @ seen / len(seen), **close)
    else:
        assert found.cross is None


@pytest.mark.parametrize(("rows", "length", "every", "held"), [
    (128, 256, 16, 8), (128, 2048, 16, 2), (128, 8192, 16, 1), (15, 64, 16, 0), (16, 64, 16, 1), (64, 64, 0, 0)])
def test_number_of_held_out_rows(rows, length, every, held):
    assert held_out_rows(rows, length, every=every) == held
