"""The quantization job: from a model directory, block by block, to a verified quantized directory."""

import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor

from gptq_belle import __version__
from gptq_belle.checkpoint.config_files import write_configuration
from gptq_belle.checkpoint.model_card import model_card
from gptq_belle.checkpoint.tokenizer_files import copy_tokenizer
from gptq_belle.checkpoint.weight_values import check_values
from gptq_belle.checkpoint.writer import CheckpointWriter, check_output_directory
from gptq_belle.common.devices import threads
from gptq_belle.common.memory import PeakMemory, lower_mmap_threshold
from gptq_belle.errors import InputError, UsageError
from gptq_belle.formats.packed_lm_head import HEAD_CODES, HEAD_SCALES, head_group_size, pack_head_codes, quantize_rows
from gptq_belle.models.architectures import LM_HEAD
from gptq_belle.quantization.activations import ActivationPair
from gptq_belle.quantization.auto_bits import check_budget, choose_bits
from gptq_belle.quantization.block_quantizer import BlockQuantizer
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.calibration.rows import Calibration
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.fingerprint import environment, environment_differences, fingerprint
from gptq_belle.quantization.job import QuantizationJob, prepare_job
from gptq_belle.quantization.journal import Journal
from gptq_belle.quantization.memory_estimate import must_spill
from gptq_belle.quantization.overrides import quantized_modules
from gptq_belle.quantization.report import JobProgress, NoProgress, Report
from gptq_belle.quantization.structure_check import check_structure
from gptq_belle.quantization.verification import (
    VERIFIED_BLOCK,
    BlockVerification,
    check_metadata,
    check_output,
    verification_tokens,
)


def write_outer_tensors(stream: BlockStream, writer: CheckpointWriter, config: QuantConfig) -> None:
    """Write every tensor outside of the blocks, some rows at a time.

    Raises:
        UsageError: the head's number of columns does not allow packing it.
        InputError: a tensor is missing, has a wrong shape, or holds values that float16 cannot represent.
    """
    head = f"{stream.arch.modules_before[0]}.weight" if stream.tied() else f"{LM_HEAD}.weight"
    for number, name in enumerate(stream.tensors_outside_blocks()):
        rows = (stream.float16(name, chunk) for chunk in stream.reader.chunks(name))
        if name == head and config.head_bits != 16:
            _write_packed(stream, writer, name, rows, config.head_bits)
        else:
            stored = name.replace(f"{LM_HEAD}.", f"{stream.arch.family.head}.")
            writer.add_rows(f"outside-blocks-{number}.safetensors", stored, stream.shape(name), rows)


def _write_packed(stream: BlockStream, writer: CheckpointWriter, name: str, rows: Iterator[Tensor], bits: int) -> None:
    """Write the matrix `name` in the layout of `formats.packed_lm_head`; of all rows only the scales stay in memory."""
    count, width = stream.shape(name)
    if (group := head_group_size(width)) is None:
        raise UsageError(f"{name} has {width} columns, which cannot be packed", "Leave --packed-head-only out.")
    scales: list[Tensor] = []

    def codes() -> Iterator[Tensor]:
        for piece in rows:
            try:
                found, scale = quantize_rows(piece, bits, group)
            except ValueError as error:
                raise InputError(f"tensor {name}: {error}", "Check the source.") from error
            scales.append(scale)
            yield pack_head_codes(found, bits)

    writer.add_rows("outside-blocks-head-codes.safetensors", HEAD_CODES, (count, width * bits // 8), codes(),
                    torch.uint8)
    writer.add("outside-blocks-head-scales.safetensors", {HEAD_SCALES: torch.cat(scales)})


def quantize_checkpoint(
    source: str | Path, out: str | Path, config: QuantConfig, *, calibration: Calibration | None = None,
    device: str = "auto", progress: JobProgress | None = None, resume: bool = True, memory: int | None = None,
    lora: str | Path | None = None, prompt_style: str | None = None,
) -> Report:
    """Quantize a model directory into a new one that any GPTQ reader loads.

    Memory holds one block in float32, the larger of two float32 matrices (K, K) of the largest linear and the forward
    pass of one batch, and the calibration activations where there is room. Finished blocks are kept in ``OUT.partial``.
    An interrupted job resumes after the last of them with its number of threads; the result is bit-identical on the
    same kind of processor (see `fingerprint.environment`).

    Args:
        source: a Hugging Face directory or hub id, in float32, float16 or bfloat16.
        out: the directory to write; it appears only when everything in it is complete and verified.
        calibration: calibration data; by default the built-in rows. Unused by method rtn.
        device: "auto", "cpu" or "cuda:N", where forward passes and the solver run.
        resume: resume an earlier job of the same source and settings; otherwise start from the first block.
        memory: limit of anonymous memory in bytes, kept by storing activations on disk; by default the free memory.
        lora: directory of a LoRA adapter to merge into the source's weights, in float32.
        prompt_style: "bloom", "llama" or "newline", for calibration and the written chat template; by default the
            source's template or that of its architecture.
    Returns:
        The content of the output's quantization_report.json.
    Raises:
        UsageError: an invalid option; an output directory that gptq_belle did not write; a group size that does not
            divide a layer; an unfinished job of another source or other settings, which are named.
        InputError: source or calibration missing, damaged or unsuitable; the tensor or line is named.
        HardwareError: no such device, or not enough memory for one block.
    """
    started = time.perf_counter()
    progress = progress or NoProgress()
    check_output_directory(Path(out))
    job = prepare_job(source, config, calibration or Calibration(), device, lora, prompt_style)
    check_budget(job)
    lower_mmap_threshold()
    spill = must_spill(job, memory)
    report = _new_report(source, job, lora)
    with PeakMemory() as peak, CheckpointWriter(out) as writer:
        _write_metadata(job, writer)  # before the work, because it can fail: it is written again with the final bits
        check_metadata(writer.files, job.tokenizer)
        journal = _journal(writer, job, report, progress, restart=not resume)
        if not journal.records:
            check_structure(job.stream)
            progress.phase("checking the values of the weights")
            check_values(job.stream.reader)
        with threads(journal.environment["threads"]):
            job, report.choice = choose_bits(job, journal, progress)
            report.settings = job.config
            writer.keep |= report.choice is not None  # the measurement takes as long as a block
            activations = job.activations(writer.partial, spill=spill)
            verification = _quantize_blocks(job, writer, journal, activations, peak, progress)
            progress.phase("writing")
            _write_metadata(job, writer)
            writer.merge()
            progress.phase("verifying the written file")
            check_output(writer.files)
            report.readback_error = verification.compare(writer.files, job.stream,
                                                          journal.tensors(VERIFIED_BLOCK))
        _complete(report, journal, writer, peak, time.perf_counter() - started)
        writer.publish()
    return report


def _new_report(source: str | Path, job: QuantizationJob, lora: str | Path | None) -> Report:
    report = Report(str(source), job.config, job.calibration, notes=list(job.notes), versions={
        "gptq_belle": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version()})
    if job.ignored:
        report.notes.append(f"{len(job.ignored)} tensors that the model does not need were left out: "
                            f"{', '.join(job.ignored[:3])}{', ...' * (len(job.ignored) > 3)}")
    if lora is not None:
        report.notes.append(f"the LoRA adapter {Path(lora).name} is merged into the weights")
    return report


def _journal(writer: CheckpointWriter, job: QuantizationJob, report: Report, progress: JobProgress, *,
             restart: bool) -> Journal:
    """The journal of this job, or of the earlier one that it resumes."""
    progress.phase("computing the source's checksums")
    now = environment(job.stream.device)
    writer.keep = True  # a refused job leaves the partial directory unchanged
    journal = Journal(writer.partial, fingerprint(job.stream.reader, job.config, job.calibration), now,
                      restart=restart)
    writer.keep = bool(journal.records)
    if journal.records:
        at = len(journal.records)
        report.resumed = [at]
        progress.phase(f"resuming after block {at} of {job.stream.count}")
        if changed := environment_differences(journal.environment, now):
            report.notes.append(f"from block {at} on, the last bits may differ from an uninterrupted job's: {changed}")
            progress.phase(report.notes[-1])
    return journal


def _quantize_blocks(job: QuantizationJob, writer: CheckpointWriter, journal: Journal, activations: ActivationPair,
                     peak: PeakMemory, progress: JobProgress) -> BlockVerification:
    """Write every part of the file: the tensors outside of the blocks, and the blocks that are not finished yet."""
    stream, done = job.stream, len(journal.records)
    write_outer_tensors(stream, writer, job.config)
    if job.tokens is not None:
        progress.phase("embedding the calibration rows")
    tokens = verification_tokens(job.tokens, stream.model.config.vocab_size)
    verification = BlockVerification(stream.embed(tokens))
    if job.tokens is not None and done == 0:
        activations.write(0, *[partial(stream.embed, job.tokens)] * len(activations.models))
    elif job.tokens is not None and done < stream.count:
        activations.load(done)
    quantizer = BlockQuantizer(stream, writer, journal, job.config, peak, progress)
    progress.start(stream.count, quantizer.steps(len(activations)), done)
    for index in range(done, stream.count):
        quantizer.run(index, activations, verification)
        writer.keep = True
    return verification


def _write_metadata(job: QuantizationJob, writer: CheckpointWriter) -> None:
    """Write the configuration, the tokenizer and the model card."""
    source, settings, tied = job.stream.reader, job.config.to_dict(), job.stream.tied()
    if (modules := quantized_modules(job.config, job.stream.arch, job.stream.count)) is not None:
        settings["modules_in_block_to_quantize"] = modules
    write_configuration(writer, source.config, settings, tied=tied)
    copy_tokenizer(writer, source.path, job.tokenizer, source.config)
    writer.write_text("README.md", model_card(source, settings))


def _complete(report: Report, journal: Journal, writer: CheckpointWriter, peak: PeakMemory, seconds: float) -> None:
    """Complete the report, with the blocks of earlier runs, and write it."""
    report.linears = [row for record in journal.records for row in record.linears]
    report.phases = [record.phases for record in journal.records]
    report.refinement = [record.refinement for record in journal.records if record.refinement is not None]
    report.notes += [note for record in journal.records for note in record.notes]
    earlier = journal.records[: report.resumed[0]] if report.resumed else []
    report.seconds = seconds + sum(record.phases["total"] for record in earlier)
    peaks = [record.peak_memory for record in journal.records] + [peak.bytes]
    report.peak_memory = max((count for count in peaks if count is not None), default=None)
    report.bytes_on_disk = sum(file.stat().st_size for file in writer.files.glob("*.safetensors"))
    # the file is published with the model: no local path, but a hub id stays
    source = Path(report.source).absolute().name if Path(report.source).exists() else report.source
    writer.write_json("quantization_report.json", report.to_dict() | {"source": source})
