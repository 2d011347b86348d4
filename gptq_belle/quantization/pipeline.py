"""The job: block by block, load, capture, solve, pack, write, propagate; then merge, read back, publish."""

import platform
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gptq_belle import __version__
from gptq_belle.checkpoint.directory import load_tokenizer, write_small_files
from gptq_belle.checkpoint.hub import model_directory
from gptq_belle.checkpoint.packing import PackedWeight, dequantize, pack
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.writer import CheckpointWriter, check_output
from gptq_belle.config import QuantConfig
from gptq_belle.errors import InputError
from gptq_belle.measure.memory import PeakMemory, trim_heap
from gptq_belle.models.skeleton import assign
from gptq_belle.quantization.calibration import Calibration, calibration_tokens, check_enough
from gptq_belle.quantization.checks import check_sizes, check_source, widest
from gptq_belle.quantization.progress import JobProgress, Silent
from gptq_belle.quantization.readback import PROBED_BLOCK, Probe
from gptq_belle.quantization.report import LinearReport, Report
from gptq_belle.quantization.solver import Solution, gptq, round_to_nearest
from gptq_belle.quantization.stream import BlockStream
from gptq_belle.runtime.chat import detect_style
from gptq_belle.runtime.loader import resolve_device

PROBE_TOKENS = 64  # of the row that is run through the first block before and after writing


def quantize_checkpoint(
    source: str | Path, out: str | Path, config: QuantConfig, *, calibration: Calibration | None = None,
    device: str = "auto", progress: JobProgress | None = None,
) -> Report:
    """Quantize a model directory into a new one that any GPTQ reader takes.

    In memory at a time: the embeddings, one block in float32, three float32 matrices of K x K of the largest linear,
    and the activations of the calibration rows.

    Args:
        source: a Hugging Face directory or hub id, in float32, float16 or bfloat16.
        out: the directory to write; it appears only when everything in it is complete and was read back.
        config: how to quantize.
        calibration: what to calibrate on; left out, the built-in rows. Unused by method rtn.
        device: "auto", "cpu" or "cuda:N", where forwards and solutions run.
        progress: told about every step.
    Returns:
        What stands in the output's quantization_report.json.
    Raises:
        UsageError: an option's value; an output that is not ours; a group size that does not divide a layer.
        InputError: source or calibration missing, damaged or unsuitable; the tensor or line is named.
        HardwareError: no such device.
    """
    began = time.monotonic()
    progress = progress or Silent()
    check_output(Path(out))
    reader = CheckpointReader(model_directory(source))
    with PeakMemory() as memory, CheckpointWriter(out) as writer:
        check_source(reader)
        stream = BlockStream(reader, resolve_device(device))
        check_sizes(stream, config)
        tokenizer = load_tokenizer(reader.path)
        report = Report(str(source), config, versions=_versions())
        tokens = None
        if config.method == "gptq":
            tokens = _calibration_tokens(calibration or Calibration(), tokenizer, stream, report)
        progress.phase("embedding the calibration rows")
        with stream.embeddings():
            probe = Probe(stream.embed(_probe_tokens(stream, tokens)))
            stream.hidden = [] if tokens is None else stream.embed(tokens)
        job = _Job(stream, writer, config, report, memory, progress)
        progress.start(stream.count, job.steps_a_block())
        for index in range(stream.count):
            job.quantize_block(index, probe)
        progress.phase("writing")
        head = stream.own_head()
        writer.add("rest.safetensors", dict(stream.rest()) | head)
        write_small_files(writer, reader, config, tokenizer, tied=not head)
        writer.merge()
        progress.phase("reading back")
        report.readback_error = probe.compare(writer.files, stream)
        report.bytes_on_disk = sum(file.stat().st_size for file in writer.files.glob("*.safetensors"))
        report.seconds, report.peak_memory = time.monotonic() - began, memory.bytes
        writer.write_json("quantization_report.json", report.to_dict())
        writer.publish()
    return report


class _Job:
    """The loop's body and what it shares from block to block."""

    def __init__(self, stream: BlockStream, writer: CheckpointWriter, config: QuantConfig, report: Report,
                 memory: PeakMemory, progress: JobProgress) -> None:
        self.stream, self.writer, self.config = stream, writer, config
        self.report, self.memory, self.progress = report, memory, progress

    def steps_a_block(self) -> int:
        """Solutions, and the batches that run once a stage and once more behind the block."""
        arch = self.stream.arch
        return len(arch.linears) + len(self.stream.hidden) * (len(arch.stages) + 1)

    def quantize_block(self, index: int, probe: Probe) -> None:
        """Solve the linears of a block in the order in which they run, write them, and move the activations on."""
        block = self.stream.block(index)
        prefix = f"{self.stream.arch.blocks}.{index}"
        tensors: dict[str, Tensor] = {}
        for stage in self.stream.arch.stages:
            hessian = self.stream.hessian(block, stage, self.progress.step) if self.stream.hidden else None
            for name in stage:
                packed, row = self._linear(block, name, f"{prefix}.{name}", hessian)
                tensors |= {f"{prefix}.{name}.{part}": value for part, value in packed._asdict().items()}
                self.report.linears.append(row)
                self.progress.linear(index, row, self.memory.bytes)
        tensors |= {f"{prefix}.{name}": parameter.to(torch.float16) for name, parameter in block.named_parameters()
                    if name.removesuffix(".weight") not in self.stream.arch.linears}
        self.writer.add(f"block-{index:05d}.safetensors", tensors)
        if index == PROBED_BLOCK:
            probe.expect(self.stream, block)
        self.stream.propagate(block, self.progress.step)
        self.stream.drop(block)

    def _linear(self, block: nn.Module, name: str, full_name: str,
                hessian: Tensor | None) -> tuple[PackedWeight, LinearReport]:
        """Quantize one linear in place."""
        began = time.monotonic()
        weight = block.get_parameter(f"{name}.weight")
        solution = _named(full_name, weight, hessian, self.config)
        assign(block, f"{name}.weight", dequantize(solution.weight))
        packed = pack(solution.weight, self.config.bits, self.config.checkpoint_format)
        outputs, inputs = weight.shape
        trim_heap()
        return packed, LinearReport(full_name, solution.error, solution.damp, time.monotonic() - began, inputs, outputs)


def _named(name: str, weight: Tensor, hessian: Tensor | None, config: QuantConfig) -> Solution:
    """Solve, and say which layer it was where that fails."""
    try:
        return round_to_nearest(weight, config) if hessian is None else gptq(weight, hessian, config)
    except InputError as error:
        raise InputError(f"{name}: {error.cause}", error.remedy) from error


def _calibration_tokens(calibration: Calibration, tokenizer: PreTrainedTokenizerBase, stream: BlockStream,
                        report: Report) -> Tensor:
    tokens = calibration_tokens(calibration, tokenizer, detect_style(stream.reader.config), stream.context)
    report.calibration = calibration.describe(tokens)
    if not calibration.allow_short:
        check_enough(tokens, *widest(stream))
    return tokens


def _probe_tokens(stream: BlockStream, tokens: Tensor | None) -> Tensor:
    if tokens is not None:
        return tokens[:1, :PROBE_TOKENS]
    return torch.arange(PROBE_TOKENS).unsqueeze(0) % stream.model.config.vocab_size


def _versions() -> dict[str, str]:
    return {"gptq_belle": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version()}
