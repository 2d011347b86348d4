"""Recorded attention outputs are reused by later passes and do not change results."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import job_output

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.quantization import activations
from gptq_belle.quantization.activations import InMemoryActivations
from gptq_belle.quantization.attention_outputs import AttentionOutputs
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.calibration.rows import Calibration
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint
from gptq_belle.quantization.stage_hessians import accumulate_hessians

CALIBRATION = Calibration(rows=32, seq_len=64, allow_short=True)


@pytest.fixture
def stream(tiny_model):
    return BlockStream(CheckpointReader(tiny_model), torch.device("cpu"))


class WithoutReuse(AttentionOutputs):
    """Records nothing, so that every pass computes attention."""

    @contextmanager
    def forward_pass(self, *_):
        yield nullcontext


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_output_is_identical_without_attention_reuse(tiny_model, tmp_path, monkeypatch, preset):
    config = QuantConfig(group_size=32, preset=preset)
    for name in ("kept", "without"):
        quantize_checkpoint(tiny_model, tmp_path / name, config, calibration=CALIBRATION)
        monkeypatch.setattr(activations, "AttentionOutputs", WithoutReuse)
    assert job_output(tmp_path / "kept") == job_output(tmp_path / "without")


def hessian(stream, block, stage, rows):
    return accumulate_hessians(stream, block, stage, rows, None, 1 << 30, lambda: None).hessian


@pytest.mark.parametrize("on_disk", [False, True])
def test_attention_runs_once_and_its_output_is_reused(stream, tmp_path, on_disk):
    arch = stream.arch
    rows = InMemoryActivations(*stream.embed(torch.randint(10, 300, (80, 64))))
    stream.max_rows = 48  # batches of 64 and 16 rows, in three pieces
    block, calls = stream.load_block(0), []
    block.get_submodule(arch.stages[0][0]).register_forward_hook(lambda *_: calls.append(1))

    def through(contexts):
        rows.attention = contexts
        found = [hessian(stream, block, stage, rows) for stage in arch.stages]
        with contexts.forward_pass(block, arch) as piece_context:
            return [*found, *(stream.run(block, states, piece_context) for states in rows)]

    expected = through(WithoutReuse())
    assert len(calls) == 4 * 3  # the pass to the first stage ends before it
    calls.clear()
    contexts = AttentionOutputs(tmp_path if on_disk else None)
    assert all(map(torch.equal, through(contexts), expected))
    assert len(calls) == 3
    assert "forward" not in vars(block.get_submodule(arch.attention))
    contexts.clear()
    assert list(tmp_path.iterdir()) == []


def test_changed_output_projection_is_noticed(stream):
    """The output projection is quantized between passes."""
    arch = stream.arch
    rows = InMemoryActivations(next(stream.embed(torch.randint(10, 300, (2, 16)))))
    block = stream.load_block(0)
    hessian(stream, block, arch.stages[1], rows)
    block.get_submodule(arch.output).weight.mul_(0.5)
    with rows.attention.forward_pass(block, arch) as piece_context:
        replayed = stream.run(block, rows.batches[0], piece_context)
    assert torch.equal(replayed, stream.run(block, rows.batches[0]))


def test_failed_pass_leaves_nothing_cached(stream):
    contexts, arch = AttentionOutputs(), stream.arch
    states = next(stream.embed(torch.randint(10, 300, (2, 16))))
    block = stream.load_block(0)

    def fail():
        with contexts.forward_pass(block, arch, arch.stages[1]) as piece_context:
            stream.run(block, states, piece_context)
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        fail()
    contexts.clear()
    with contexts.forward_pass(block, arch) as piece_context:
        stream.run(block, states, piece_context)
    assert len(list(contexts)) == 1
