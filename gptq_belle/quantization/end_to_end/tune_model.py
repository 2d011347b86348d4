"""Preset max's last phase: the quantized model as a whole is tuned, and what changed goes into the file."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.quantization.end_to_end.rows import tuning_rows
from gptq_belle.quantization.end_to_end.savepoint import Savepoint
from gptq_belle.quantization.end_to_end.student import read_student
from gptq_belle.quantization.end_to_end.tuning import Tuning
from gptq_belle.quantization.job import QuantizationJob
from gptq_belle.quantization.journal import Journal
from gptq_belle.quantization.report import JobProgress
from gptq_belle.quantization.verification import VERIFIED_BLOCK, BlockVerification

PART = "tuned.safetensors"  # sorts behind all other parts, and what it holds counts instead of theirs


def distill(job: QuantizationJob, writer: CheckpointWriter, journal: Journal, verification: BlockVerification,
            progress: JobProgress) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Tune the finished blocks, and write what changed as a part of its own.

    An interrupted phase goes on behind its last look at the held-out rows, and ends bit for bit where it would have.

    Returns:
        `TuningResult` for the report, and what the verification is to compare the written file with.
    """
    def step(index: int) -> None:
        progress.phase(f"what the full-precision model predicts: block {index + 1} of {job.stream.count}")

    stream, steps = job.stream, job.config.techniques.tuning_steps
    rows, held_out = tuning_rows(job, journal.folder / "rows.f32", step)
    origin = [stamp for record in journal.records for name, stamp in record.files.items() if name.startswith("parts/")]
    student = read_student(stream, writer.written(), job.config)
    told = Tuning(student, torch.cat(list(stream.head())), rows, held_out, Savepoint(journal.folder, origin),
                  steps).run(progress)
    writer.add(PART, student.tensors())
    return asdict(told), verification.expected_output(stream, student.blocks[VERIFIED_BLOCK])
