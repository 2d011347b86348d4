"""The job: block by block, load, capture, solve, pack, write, propagate; then merge, read back, publish."""

import platform
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gptq_belle import __version__
from gptq_belle.checkpoint.directory import load_tokenizer, write_small_files
from gptq_belle.checkpoint.hub import model_directory
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.writer import CheckpointWriter, check_output
from gptq_belle.config import QuantConfig
from gptq_belle.measure.memory import PeakMemory
from gptq_belle.quantization.activations import Activations
from gptq_belle.quantization.block import BlockJob
from gptq_belle.quantization.calibration import Calibration, calibration_tokens, check_enough
from gptq_belle.quantization.checks import check_sizes, check_source, widest
from gptq_belle.quantization.fingerprint import differences, environment, fingerprint
from gptq_belle.quantization.journal import Journal
from gptq_belle.quantization.progress import JobProgress, Silent
from gptq_belle.quantization.readback import PROBED_BLOCK, Probe
from gptq_belle.quantization.report import Report
from gptq_belle.quantization.stream import BlockStream
from gptq_belle.quantization.threads import threads
from gptq_belle.runtime.chat import detect_style
from gptq_belle.runtime.loader import resolve_device

PROBE_TOKENS = 64  # of the row that is run through the first block before and after writing


def quantize_checkpoint(
    source: str | Path, out: str | Path, config: QuantConfig, *, calibration: Calibration | None = None,
    device: str = "auto", progress: JobProgress | None = None, resume: bool = True,
) -> Report:
    """Quantize a model directory into a new one that any GPTQ reader takes.

    In memory at a time: one block in float32, three float32 matrices of K x K of the largest linear, and the
    activations of the calibration rows. What is finished is kept in ``OUT.partial``; a job that was ended in any way
    goes on behind its last finished block, and ends bit for bit where it would have ended: with the number of threads
    it was begun with, and on the same kind of processor (see `fingerprint.environment`).

    Args:
        source: a Hugging Face directory or hub id, in float32, float16 or bfloat16.
        out: the directory to write; it appears only when everything in it is complete and was read back.
        config: how to quantize.
        calibration: what to calibrate on; left out, the built-in rows. Unused by method rtn.
        device: "auto", "cpu" or "cuda:N", where forwards and solutions run.
        progress: told about every step.
        resume: go on with what an earlier job of the same source and settings has finished; else begin anew.
    Returns:
        What stands in the output's quantization_report.json.
    Raises:
        UsageError: an option's value; an output that is not ours; a group size that does not divide a layer; an
            unfinished job of another source or other settings, which are named.
        InputError: source or calibration missing, damaged or unsuitable; the tensor or line is named.
        HardwareError: no such device.
    """
    began = time.perf_counter()
    progress = progress or Silent()
    check_output(Path(out))
    reader = CheckpointReader(model_directory(source))
    check_source(reader)
    stream = BlockStream(reader, resolve_device(device))
    check_sizes(stream, config)
    tokenizer = load_tokenizer(reader.path)
    report = Report(str(source), config, versions=_versions())
    tokens = None
    if config.method == "gptq":
        tokens = _calibration_tokens(calibration or Calibration(), tokenizer, stream, report)
    with PeakMemory() as memory, CheckpointWriter(out) as writer:
        journal = _journal(writer, stream, report, progress, restart=not resume)
        with threads(journal.environment["threads"]):
            probe = _quantize_blocks(stream, writer, journal, tokens, config, memory, progress)
            progress.phase("writing")
            write_small_files(writer, reader, config, tokenizer, tied=stream.tied())
            writer.merge()
            progress.phase("reading back")
            report.readback_error = probe.compare(writer.files, stream, journal.tensors(PROBED_BLOCK))
        _complete(report, journal, writer, memory, time.perf_counter() - began)
        writer.publish()
    return report


def _journal(writer: CheckpointWriter, stream: BlockStream, report: Report, progress: JobProgress, *,
             restart: bool) -> Journal:
    """The journal of this job, or of the one that it goes on with."""
    progress.phase("reading the source for its fingerprint")
    now = environment(stream.device)
    writer.keep = True  # a refusal leaves what is there
    journal = Journal(writer.partial, fingerprint(stream.reader, report.settings, report.calibration), now,
                      restart=restart)
    writer.keep = bool(journal.records)
    if journal.records:
        at = len(journal.records)
        report.resumed = [at]
        progress.phase(f"going on behind block {at} of {stream.count}")
        if changed := differences(journal.environment, now):
            report.notes.append(f"from block {at} on, the last bits may differ from an undisturbed job's: {changed}")
            progress.phase(report.notes[-1])
    return journal


def _quantize_blocks(stream: BlockStream, writer: CheckpointWriter, journal: Journal, tokens: Tensor | None,
                     config: QuantConfig, memory: PeakMemory, progress: JobProgress) -> Probe:
    """Every part of the written file: what stays as it is, and the blocks that are not finished yet."""
    for number, name in enumerate(stream.rest()):
        rows = (stream.float16(name, chunk) for chunk in stream.reader.chunks(name))
        writer.add_rows(f"rest-{number}.safetensors", name, stream.shape(name), rows)
    progress.phase("embedding the calibration rows")
    probe = Probe(stream.embed(_probe_tokens(stream, tokens)))
    done = len(journal.records)
    activations = _activations(stream, writer, tokens, done)
    job = BlockJob(stream, writer, journal, config, memory, progress)
    progress.start(stream.count - done, job.steps(len(activations)))
    for index in range(done, stream.count):
        job.run(index, activations, probe)
        writer.keep = True
    return probe


def _activations(stream: BlockStream, writer: CheckpointWriter, tokens: Tensor | None, done: int) -> Activations:
    """The calibration rows in front of the first block that is not finished."""
    if tokens is None:
        return Activations(writer.partial, [])
    hidden_size = stream.model.config.hidden_size
    activations = Activations(writer.partial, [(*batch.shape, hidden_size) for batch in stream.batches(tokens)])
    if done == 0:
        activations.write(0, stream.embed(tokens))
    elif done < stream.count:
        activations.load(done)
    return activations


def _complete(report: Report, journal: Journal, writer: CheckpointWriter, memory: PeakMemory, seconds: float) -> None:
    """Fill in the report and write it; earlier jobs' blocks count."""
    report.linears = [row for record in journal.records for row in record.linears]
    report.phases = [record.phases for record in journal.records]
    report.notes += [note for record in journal.records for note in record.notes]
    earlier = journal.records[: report.resumed[0]] if report.resumed else []
    report.seconds = seconds + sum(record.phases["total"] for record in earlier)
    peaks = [record.peak_memory for record in journal.records] + [memory.bytes]
    report.peak_memory = max((peak for peak in peaks if peak is not None), default=None)
    report.bytes_on_disk = sum(file.stat().st_size for file in writer.files.glob("*.safetensors"))
    writer.write_json("quantization_report.json", report.to_dict())


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
