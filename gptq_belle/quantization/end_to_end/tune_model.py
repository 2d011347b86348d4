"""The last phase of preset max: tune the quantized model end to end, and write the tuned tensors."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.quantization.end_to_end.student import read_student
from gptq_belle.quantization.end_to_end.tuning import Tuner
from gptq_belle.quantization.end_to_end.tuning_checkpoint import TuningCheckpoint
from gptq_belle.quantization.end_to_end.tuning_rows import tuning_rows
from gptq_belle.quantization.job import QuantizationJob
from gptq_belle.quantization.journal import Journal
from gptq_belle.quantization.report import JobProgress
from gptq_belle.quantization.verification import VERIFIED_BLOCK, BlockVerification

PART = "tuned.safetensors"  # sorts after all other parts, whose tensors it replaces


def tune_model(job: QuantizationJob, writer: CheckpointWriter, journal: Journal, verification: BlockVerification,
               progress: JobProgress) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Tune the finished blocks, and write the tuned tensors as a separate part.

    An interrupted phase resumes after its last validation step, with a bit-identical result.

    Returns:
        `TuningResult` as a dictionary for the report, and the expected output for `BlockVerification.compare`.
    """
    def step(index: int) -> None:
        progress.phase(f"computing the full-precision model's outputs: block {index + 1} of {job.stream.count}")

    stream, steps = job.stream, job.config.techniques.tuning_steps
    rows, held_out = tuning_rows(job, journal.folder / "rows.f32", step)
    parts = [stamp for record in journal.records for name, stamp in record.files.items() if name.startswith("parts/")]
    student = read_student(stream, writer.written(), job.config)
    head = torch.cat(list(stream.head()))
    result = Tuner(student, head, rows, held_out, TuningCheckpoint(journal.folder, parts), steps).run(progress)
    writer.add(PART, student.tensors())
    return asdict(result), verification.expected_output(stream, student.blocks[VERIFIED_BLOCK])
