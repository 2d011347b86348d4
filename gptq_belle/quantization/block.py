"""One block of a job: capture, solve, pack, write, propagate; and what is tried where a GPU's memory does not suffice.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.empty_model import assign
from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.common.files import Stamp
from gptq_belle.common.memory import PeakMemory, trim_heap
from gptq_belle.errors import InputError
from gptq_belle.formats.gptq_weight import PackedWeight, dequantize, pack
from gptq_belle.quantization.activations import ActivationPair, Activations, map_batches
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.journal import Journal, Record
from gptq_belle.quantization.report import JobProgress, LinearReport
from gptq_belle.quantization.solution_choice import ChosenSolution, best_solution
from gptq_belle.quantization.solver import HessianFactor, factorize, round_to_nearest
from gptq_belle.quantization.stage_hessians import OriginalWeights, StageHessians, accumulate_hessians
from gptq_belle.quantization.verification import VERIFIED_BLOCK, BlockVerification


class BlockQuantizer:
    """What is done to every block, and what that shares from block to block."""

    def __init__(self, stream: BlockStream, writer: CheckpointWriter, journal: Journal, config: QuantConfig,
                 memory: PeakMemory, progress: JobProgress) -> None:
        self.stream, self.writer, self.journal, self.config = stream, writer, journal, config
        self.memory, self.progress, self.clock = memory, progress, stream.clock

    def steps(self, batches: int) -> int:
        """Solutions, and the batches that run once a stage and once more behind the block (but not the last one)."""
        arch = self.stream.arch
        return len(arch.linears) + batches * (len(arch.stages) + (2 if self.config.techniques.alpha else 1))

    def run(self, index: int, activations: ActivationPair, verification: BlockVerification) -> None:
        """Quantize a block, move the activations behind it, and commit both.

        Where a GPU runs out of memory, the block is begun again with half as many rows at a time, at last on the CPU;
        the record says so. Rows at a time stay halved, for the next block is as large; the device does not.

        Raises:
            OutOfMemoryError: on the CPU too.
        """
        notes: list[str] = []
        device, failed = self.stream.device, torch.OutOfMemoryError()
        for way in self._fallbacks(activations):
            self.clock.restart()
            began = time.perf_counter()
            try:
                record, files, tensors = self._attempt(index, activations, verification)
                break
            except torch.OutOfMemoryError as error:
                failed = error.with_traceback(None)  # whose frames hold what is to be freed
                notes.append(f"block {index}: out of memory {way}")
                self.progress.phase(notes[-1])
        else:
            raise failed
        self.stream.device = device
        record.notes = notes
        record.phases = self.clock.restart() | {"total": time.perf_counter() - began}
        self.journal.commit(record, files, tensors)
        activations.forget(index)

    def _fallbacks(self, activations: ActivationPair) -> Iterator[str]:
        """What is tried one after the other, each in words once it is set."""
        stream = self.stream
        rows = stream.max_rows or max((shape[0] for shape in activations.quantized.shapes), default=1)
        yield f"on {stream.device} with {rows} rows at a time"
        while rows > 1:
            rows //= 2
            stream.max_rows = rows
            _empty_cuda_cache(stream.device)
            yield f"on {stream.device} with {rows} rows at a time"
        _empty_cuda_cache(stream.device)
        stream.device = torch.device("cpu")
        yield "on the CPU"

    def _attempt(self, index: int, activations: ActivationPair,
                 verification: BlockVerification) -> tuple[Record, dict[str, Stamp], dict[str, Tensor]]:
        """Everything about a block but the record's last lines."""
        stream, record, originals = self.stream, Record(), OriginalWeights()
        block = stream.load_block(index)
        stream.prefetch(index + 1)
        try:
            packed = self._solve(index, block, activations, originals, record)
            with self.clock("writing"):
                part = f"block-{index:05d}.safetensors"
                files = {f"parts/{part}": self.writer.add(part, packed)}
            tensors = verification.expected_output(stream, block) if index == VERIFIED_BLOCK else {}
            if len(activations) and index + 1 < stream.count:
                with self.clock("writing"):
                    files |= self._propagate(index, block, activations, originals)
        finally:
            activations.clear_attention()
            stream.release(block)
        record.peak_memory = self.memory.bytes
        return record, files, tensors

    def _propagate(self, index: int, block: nn.Module, activations: ActivationPair, originals: OriginalWeights,
                   ) -> dict[str, Stamp]:
        """Move the activations behind the block, those of the full-precision model through its original weights."""
        def outputs(states: Activations) -> Iterator[Tensor]:
            with states.attention.forward_pass(block, self.stream.arch) as piece_context:
                yield from map_batches(lambda batch: self.stream.run(block, batch, piece_context), states,
                                       self.progress.step)

        def full() -> Iterator[Tensor]:
            assert activations.full is not None
            with originals.in_place(block):
                yield from outputs(activations.full)

        ways = [lambda: outputs(activations.quantized), full]
        return activations.write(index + 1, *ways[: len(activations.models)])

    def _solve(self, index: int, block: nn.Module, activations: ActivationPair, originals: OriginalWeights,
               record: Record) -> dict[str, Tensor]:
        """Solve the linears in the order in which they run; the tensors that the file holds of the block."""
        arch, prefix = self.stream.arch, f"{self.stream.arch.blocks}.{index}"
        tensors: dict[str, Tensor] = {}
        for stage in arch.stages:
            own = self.config.of(f"{prefix}.{stage[0]}")  # and of all the stage, see overrides.resolve_overrides
            found = None
            if len(activations) and own:
                found = self._inputs(block, stage, prefix, activations, originals, own)
            for name in stage:
                if activations.full is not None:
                    originals.keep(block, f"{name}.weight")
                if own is None:
                    row = self._keep_float16(block, name, f"{prefix}.{name}")
                else:
                    packed, row = self._linear(block, name, f"{prefix}.{name}", found, own)
                    tensors |= {f"{prefix}.{name}.{part}": value.cpu() for part, value in packed._asdict().items()}
                record.linears.append(row)
                self.progress.linear(index, row, self.memory.bytes)
        return tensors | {f"{prefix}.{name}": parameter.to(torch.float16) for name, parameter in
                          block.named_parameters() if f"{prefix}.{name.removesuffix('.weight')}.qweight" not in tensors}

    def _keep_float16(self, block: nn.Module, name: str, full_name: str) -> LinearReport:
        """A linear that stays in float16, which is what the blocks behind it shall see."""
        weight = block.get_parameter(f"{name}.weight")
        rounded = self.stream.float16(f"{full_name}.weight", weight).float()
        error = float((rounded - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
        assign(block, f"{name}.weight", rounded)
        return LinearReport(full_name, error, 0.0, 0.0, weight.shape[1], weight.shape[0], 16)

    def _inputs(self, block: nn.Module, stage: tuple[str, ...], prefix: str, activations: ActivationPair,
                originals: OriginalWeights, config: QuantConfig) -> tuple[StageHessians, HessianFactor]:
        """What the solver knows of the inputs that the linears of a stage share."""
        full = None if activations.full is None else (originals, activations.full)
        found = accumulate_hessians(self.stream, block, stage, activations.quantized, full, activations.seen,
                                    self.progress.step)
        with self.clock("solving"), _naming(f"{prefix}.{stage[0]}"):
            return found, factorize(found.hessian, config)

    def _linear(self, block: nn.Module, name: str, full_name: str, inputs: tuple[StageHessians, HessianFactor] | None,
                config: QuantConfig) -> tuple[PackedWeight, LinearReport]:
        """Quantize one linear in place, by its own settings."""
        began = time.perf_counter()
        weight = block.get_parameter(f"{name}.weight").detach()
        N, K = weight.shape
        with self.clock("solving"), _naming(full_name):
            choice = ChosenSolution(round_to_nearest(weight, config), "", {}) if inputs is None else best_solution(
                weight, *inputs, config)
        solution = choice.solution
        with self.clock("packing"):
            needed = inputs is not None and inputs[0].cross is not None  # by the full-precision model
            assign(block, f"{name}.weight", dequantize(solution.weight, out=None if needed else weight))
            packed = pack(solution.weight, config.bits, config.checkpoint_format)
            trim_heap()
        seconds = time.perf_counter() - began
        return packed, LinearReport(full_name, solution.error, solution.damp, seconds, K, N, config.bits, choice.won,
                                    choice.held_out)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """An error inside says which layer it was."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error.cause}", error.remedy) from error


def _empty_cuda_cache(device: torch.device) -> None:
    """Hand the memory that torch keeps for later back to a GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
