"""Quantize one block: accumulate Hessians, solve, pack, write, propagate; with fallbacks where GPU memory runs out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.empty_model import assign
from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.common.files import FileChecksum
from gptq_belle.common.memory import PeakMemory, trim_heap
from gptq_belle.errors import InputError, is_out_of_memory
from gptq_belle.formats.gptq_weight import PackedWeight, dequantize, pack
from gptq_belle.quantization.activations import ActivationPair, Activations
from gptq_belle.quantization.block_refinement.refinement import (
    BlockRefinement,
    RefinedLinear,
    first_dampings,
    refined_linear,
)
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.candidate_selection import ChosenSolution, best_solution
from gptq_belle.quantization.channel_scales import fold_channel_scales
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.journal import BlockRecord, Journal
from gptq_belle.quantization.report import JobProgress, LinearReport
from gptq_belle.quantization.solver import HessianFactor, factorize, round_to_nearest
from gptq_belle.quantization.stage_hessians import OriginalWeights, StageHessians, accumulate_hessians
from gptq_belle.quantization.verification import VERIFIED_BLOCK, BlockVerification


class BlockQuantizer:
    """Quantizes the blocks of a job one after another."""

    def __init__(self, stream: BlockStream, writer: CheckpointWriter, journal: Journal, config: QuantConfig,
                 memory: PeakMemory, progress: JobProgress) -> None:
        self.stream, self.writer, self.journal, self.config = stream, writer, journal, config
        self.memory, self.progress, self.clock = memory, progress, stream.clock

    def steps(self, batches: int) -> int:
        """Progress steps per block: for each linear 1 + rounds, for each batch its stages and each model's outputs."""
        arch = self.stream.arch
        techniques = self.config.techniques
        return (len(arch.linears) * (1 + techniques.rounds) +
                batches * (len(arch.stages) + (2 if techniques.full_precision else 1)))

    def run(self, index: int, activations: ActivationPair, verification: BlockVerification) -> None:
        """Quantize a block, replace the activations by the block's outputs, and commit both.

        If GPU memory runs out, the block is repeated with half as many rows at a time, and finally on the CPU, and the
        record notes it. Later blocks keep the smaller number of rows, because they are as large, but run on the GPU.

        Raises:
            OutOfMemoryError: memory runs out on the CPU too.
        """
        notes: list[str] = []
        device, failure = self.stream.device, RuntimeError()
        for description in self._fallbacks(activations):
            self.clock.restart()
            started = time.perf_counter()
            try:
                record, files, tensors = self._attempt(index, activations, verification)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # its frames hold the tensors to be freed
                notes.append(f"block {index}: out of memory {description}")
                self.progress.phase(notes[-1])
        else:
            raise failure
        self.stream.device = device
        record.notes = notes
        record.phases = self.clock.restart() | {"total": time.perf_counter() - started}
        self.journal.commit(record, files, tensors)
        activations.delete(index)

    def _fallbacks(self, activations: ActivationPair) -> Iterator[str]:
        """Set each fallback strategy in order, and yield its description."""
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
                 verification: BlockVerification) -> tuple[BlockRecord, dict[str, FileChecksum], dict[str, Tensor]]:
        """Quantize and write a block; returns its record without notes and phases, its files, and journal tensors."""
        stream, record, originals = self.stream, BlockRecord(), OriginalWeights()
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

    def _propagate(self, index: int, block: nn.Module, activations: ActivationPair,
                   originals: OriginalWeights) -> dict[str, FileChecksum]:
        """Replace the activations by the block's outputs, for the full-precision model with the original weights."""
        def outputs(states: Activations) -> Iterator[Tensor]:
            with states.attention.forward_pass(block, self.stream.arch) as piece_context:
                for batch in states:
                    yield self.stream.run(block, batch, piece_context)
                    self.progress.step()

        def full_outputs() -> Iterator[Tensor]:
            assert activations.full is not None
            with originals.restored(block):
                yield from outputs(activations.full)

        outputs_of = [lambda: outputs(activations.quantized), full_outputs]
        return activations.write(index + 1, *outputs_of[: len(activations.models)])

    def _solve(self, index: int, block: nn.Module, activations: ActivationPair, originals: OriginalWeights,
               record: BlockRecord) -> dict[str, Tensor]:
        """Quantize the linears in the order in which they run; returns the block's tensors as stored in the file."""
        arch, prefix = self.stream.arch, f"{self.stream.arch.blocks}.{index}"
        tensors: dict[str, Tensor] = {}
        refined: dict[str, RefinedLinear] = {}
        for stage, norm, damping in zip(arch.stages, self.stream.foldable_norms, first_dampings(arch), strict=True):
            config = self.config.for_linear(f"{prefix}.{stage[0]}")  # equal in a stage, see resolve_overrides
            inputs = None
            if activations.full is not None:
                originals.save(block, stage, norm)
            if len(activations) and config:
                inputs = self._hessians(block, stage, norm, prefix, activations, originals, config)
            for name in stage:
                if config is None:
                    row = self._keep_float16(block, name, f"{prefix}.{name}")
                else:
                    packed, row = self._linear(block, name, f"{prefix}.{name}", inputs, config)
                    if inputs is not None and self.config.techniques.rounds:
                        refined[name] = refined_linear(packed, inputs[0], config, damping)
                    tensors |= _packed_tensors(f"{prefix}.{name}", packed)
                record.linears.append(row)
                self.progress.linear(index, row, self.memory.bytes)
        if refined:
            tensors |= self._refine(index, block, activations, originals, refined, record)
        return tensors | {f"{prefix}.{name}": parameter.to(torch.float16) for name, parameter in
                          block.named_parameters() if f"{prefix}.{name.removesuffix('.weight')}.qweight" not in tensors}

    def _refine(self, index: int, block: nn.Module, activations: ActivationPair, originals: OriginalWeights,
                linears: dict[str, RefinedLinear], record: BlockRecord) -> dict[str, Tensor]:
        """Refine the block's linears together, and put their errors into the report; returns the packed tensors."""
        prefix = f"{self.stream.arch.blocks}.{index}"
        with self.clock("refining"):
            refinement = BlockRefinement(self.stream, block, linears, originals, activations)
            result = refinement.run(index, self.config.techniques.rounds, self.progress.step)
        record.refinement = asdict(result)
        errors = {f"{prefix}.{name}": linear.error(originals.weights[f"{name}.weight"])
                  for name, linear in linears.items()}
        record.linears = [replace(row, error=errors.get(row.name, row.error)) for row in record.linears]
        return {key: value for name, linear in linears.items() for key, value in _packed_tensors(
            f"{prefix}.{name}", pack(linear.weight, linear.config.bits, linear.config.checkpoint_format)).items()}

    def _keep_float16(self, block: nn.Module, name: str, full_name: str) -> LinearReport:
        """Round a linear that is not quantized to float16, so that later blocks see the stored values."""
        weight = block.get_parameter(f"{name}.weight")
        rounded = self.stream.float16(f"{full_name}.weight", weight).float()
        error = float((rounded - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
        assign(block, f"{name}.weight", rounded)
        return LinearReport(full_name, error, 0.0, 0.0, weight.shape[1], weight.shape[0], 16)

    def _hessians(self, block: nn.Module, stage: tuple[str, ...], norm: str, prefix: str, activations: ActivationPair,
                  originals: OriginalWeights, config: QuantConfig) -> tuple[StageHessians, HessianFactor]:
        """The Hessians of a stage's inputs, with channel scales folded into its norm, and the factor of the inverse."""
        full = None if activations.full is None else (originals, activations.full)
        hessians = accumulate_hessians(self.stream, block, stage, activations.quantized, full, activations.hessian_rows,
                                       self.progress.step)
        with self.clock("solving"), _layer_named(f"{prefix}.{stage[0]}"):
            factor = factorize(hessians.hessian, config)
            if norm and config.techniques.fold:
                return fold_channel_scales(block, norm, stage, hessians, factor, config)
            return hessians, factor

    def _linear(self, block: nn.Module, name: str, full_name: str, inputs: tuple[StageHessians, HessianFactor] | None,
                config: QuantConfig) -> tuple[PackedWeight, LinearReport]:
        """Quantize one linear in place; without Hessians its weight is rounded to nearest."""
        started = time.perf_counter()
        weight = block.get_parameter(f"{name}.weight").detach()
        N, K = weight.shape
        with self.clock("solving"), _layer_named(full_name):
            if inputs is None:
                chosen = ChosenSolution(round_to_nearest(weight, config), "", {})
            else:
                chosen = best_solution(weight, *inputs, config)
        solution = chosen.solution
        with self.clock("packing"):
            # The full-precision model needs the weight, unless channel scales have replaced it.
            needed = inputs is not None and inputs[0].cross is not None and inputs[0].scales is None
            assign(block, f"{name}.weight", dequantize(solution.weight, out=None if needed else weight))
            packed = pack(solution.weight, config.bits, config.checkpoint_format)
            trim_heap()
        seconds = time.perf_counter() - started
        return packed, LinearReport(full_name, solution.error, solution.damp, seconds, K, N, config.bits, chosen.won,
                                    chosen.held_out)


def _packed_tensors(name: str, packed: PackedWeight) -> dict[str, Tensor]:
    return {f"{name}.{part}": value.cpu() for part, value in packed._asdict().items()}


@contextmanager
def _layer_named(name: str) -> Iterator[None]:
    """Add the layer's name to an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error.cause}", error.remedy) from error


def _empty_cuda_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
