"""What attention has computed is kept for the passes behind it, and changes nothing but their number."""

from contextlib import nullcontext

import pytest
import torch
from conftest import job_output

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.config import QuantConfig
from gptq_belle.quantization.calibration import Calibration
from gptq_belle.quantization.contexts import Contexts
from gptq_belle.quantization.pipeline import quantize_checkpoint
from gptq_belle.quantization.stream import BlockStream

CALIBRATION = Calibration(rows=32, seq_len=64, allow_short=True)


@pytest.fixture
def stream(tiny_model):
    return BlockStream(CheckpointReader(tiny_model), torch.device("cpu"))


def test_jobs_end_in_the_same_bytes_without_it(tiny_model, tmp_path, monkeypatch):
    for name in ("kept", "anew"):
        quantize_checkpoint(tiny_model, tmp_path / name, QuantConfig(group_size=32), calibration=CALIBRATION)
        monkeypatch.setattr(Contexts, "during", lambda *_: nullcontext())
    assert job_output(tmp_path / "kept") == job_output(tmp_path / "anew")


@pytest.mark.parametrize("on_disk", [False, True])
def test_attention_runs_once_and_its_successors_see_the_same(stream, tmp_path, on_disk):
    contexts, arch = Contexts(tmp_path if on_disk else None), stream.arch
    batches = list(stream.embed(torch.randint(10, 300, (80, 64))))
    stream.most_rows = 48  # batches of 64 and 16 rows, in three pieces
    block, calls = stream.block(0), []
    block.get_submodule(arch.stages[0][0]).register_forward_hook(lambda *_: calls.append(1))

    def through(during):
        found = []
        for stage in arch.stages:
            with during(block, arch, stage):
                found.append(stream.hessian(block, stage, batches, lambda: None))
        with during(block, arch):
            return [*found, *(stream.run(block, states) for states in batches)]

    expected = through(lambda *_: nullcontext())
    assert len(calls) == 4 * 3  # the pass to the first stage ends in front of it
    calls.clear()
    assert all(map(torch.equal, through(contexts.during), expected))
    assert len(calls) == 3
    assert "forward" not in vars(block.get_submodule(arch.attention))
    contexts.clear()
    assert list(tmp_path.iterdir()) == []


def test_another_output_projection_is_seen(stream):
    """It is quantized between the passes."""
    contexts, arch = Contexts(), stream.arch
    states = next(stream.embed(torch.randint(10, 300, (2, 16))))
    block = stream.block(0)
    with contexts.during(block, arch, arch.stages[1]):
        stream.hessian(block, arch.stages[1], [states], lambda: None)
    block.get_submodule(arch.output).weight.mul_(0.5)
    with contexts.during(block, arch):
        replayed = stream.run(block, states)
    assert torch.equal(replayed, stream.run(block, states))


def test_a_pass_that_fails_keeps_nothing(stream):
    contexts, arch = Contexts(), stream.arch
    states = next(stream.embed(torch.randint(10, 300, (2, 16))))
    block = stream.block(0)

    def broken():
        yield states
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError), contexts.during(block, arch, arch.stages[1]):
        stream.hessian(block, arch.stages[1], broken(), lambda: None)
    contexts.clear()
    with contexts.during(block, arch):
        stream.run(block, states)
    assert len(list(contexts)) == 1
