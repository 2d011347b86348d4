"""The journal of a job on disk: an interrupted job resumes after its last finished block.

``OUT.partial/journal`` holds ``job.json``, the fingerprint of source, calibration and settings, and one record
``block-NNNNN.json`` per finished block. A record is written last, when every file that it names is durably on disk, and
holds their sizes and checksums: the block's packed tensors (``parts/``), the activations after it, and further tensors
(`Journal.tensors`). Files without a record, and records with missing or damaged files, are ignored.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from gptq_belle.checkpoint.reader import read_json
from gptq_belle.checkpoint.safetensors_file import TensorFile, write_tensors
from gptq_belle.common.files import UNFINISHED_SUFFIX, FileChecksum, fsync, matches_checksum, write_json_atomically
from gptq_belle.errors import GptqBelleError, UsageError
from gptq_belle.quantization.report import LinearReport

JOB = "job.json"
VERSION = 5  # of the journal on disk; a journal of another version is refused
QUANTIZED, FULL = "quantized", "full"  # the models whose activations are kept; prefixes of file names


@dataclass(slots=True)
class BlockRecord:
    """One finished block.

    Attributes:
        linears: its rows of the report, in the order of solving.
        phases: seconds by phase; "total" is the whole block.
        peak_memory: peak of the job so far, in bytes.
        refinement: result of block refinement (`block_refinement.refinement.RefinementResult`); None without it.
        notes: unplanned events for the report, such as a fallback to the CPU.
        files: size and checksum of its files, by path below ``OUT.partial``.
    """

    linears: list[LinearReport] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    refinement: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    files: dict[str, FileChecksum] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of asdict.

        Raises:
            TypeError, AttributeError, KeyError: the value is not a record.
        """
        linears = [LinearReport(**row) for row in value["linears"]]
        files = {name: FileChecksum(*stamp) for name, stamp in value["files"].items()}
        return cls(**{**value, "linears": linears, "files": files})


class Journal:
    """The finished blocks of a job.

    Args:
        partial: ``OUT.partial``, locked by this process.
        fingerprint: inputs that determine the result, by topic (see `fingerprint.fingerprint`).
        environment: see `fingerprint.environment`.
        restart: delete the journal of an earlier job.

    Attributes:
        records: of the finished blocks, from the first one on; those of an earlier job have been verified.
        environment: the environment in which the job was started.
        bit_allocation: the bits of each stage with their measured losses, JSON-ready (see `auto_bits.choose_bits`);
            None before they are chosen, and without a budget.

    Raises:
        UsageError: an earlier job has a different fingerprint; the differences are named.
    """

    def __init__(self, partial: Path, fingerprint: Mapping[str, Mapping[str, Any]], environment: Mapping[str, Any], *,
                 restart: bool = False) -> None:
        self.partial, self.folder = partial, partial / "journal"
        self.records: list[BlockRecord] = []
        self.environment = dict(environment)
        self.bit_allocation: dict[str, Any] | None = None
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        job = {"journal": {"version": VERSION}} | {topic: dict(values) for topic, values in fingerprint.items()}
        if (earlier := self._earlier()) is not None:
            self.environment = earlier.pop("environment", self.environment)
            self.bit_allocation = earlier.pop("bit_allocation", None)
            _refuse_differences(partial, earlier, job)
            self.records = list(self._whole_records())
        else:
            self.folder.mkdir(exist_ok=True)
            fsync(partial)
            write_json_atomically(self.folder / JOB, job | {"environment": self.environment})
        self._job = job
        self._clear()

    def save_bit_allocation(self, allocation: dict[str, Any]) -> None:
        """Save the bit allocation: losses measured again could differ in their last bits, and so could the choice."""
        job = self._job | {"environment": self.environment, "bit_allocation": allocation}
        write_json_atomically(self.folder / JOB, job)
        self.bit_allocation = allocation

    def commit(self, record: BlockRecord, files: Mapping[str, FileChecksum],
               tensors: Mapping[str, Tensor] | None = None) -> None:
        """Record a finished block durably: after this returns, it survives a crash and a power cut.

        Args:
            record: the block's record; its files are filled in.
            files: the block's files, already written durably, by path below ``OUT.partial``.
            tensors: further tensors to save with the block, see `tensors`.
        """
        index = len(self.records)
        record.files = dict(files)
        if tensors:
            name = f"journal/tensors-{index:05d}.safetensors"
            record.files[name] = write_tensors(self.partial / name, tensors)
        content = asdict(record)
        write_json_atomically(self._path(index), content | {"checksum": _checksum(content)})
        self.records.append(record)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The further tensors that were saved with a finished block."""
        name = f"journal/tensors-{index:05d}.safetensors"
        if name not in self.records[index].files:
            return {}
        file = TensorFile(self.partial / name)
        return {key: file.tensor(key) for key in file.names()}

    def _earlier(self) -> dict[str, Any] | None:
        """The content of an earlier job's job.json; None where there is none or it is damaged."""
        try:
            return read_json(self.folder / JOB)
        except GptqBelleError:
            return None

    def _whole_records(self) -> Iterator[BlockRecord]:
        """The records of all finished blocks; none where a file is missing or damaged.

        Activations are kept after the last finished block only. Without them no later block can be quantized, so the
        job starts over.
        """
        found: list[BlockRecord] = []
        while (record := self._read(len(found))) is not None:
            found.append(record)
        for place, record in enumerate(found):
            last = place == len(found) - 1
            for name, stamp in record.files.items():
                if (last or not is_activations(name)) and not matches_checksum(self.partial / name, stamp):
                    return
        yield from found

    def _read(self, index: int) -> BlockRecord | None:
        try:
            value = read_json(self._path(index))
            checksum = value.pop("checksum")
            return BlockRecord.from_dict(value) if checksum == _checksum(value) else None
        except (GptqBelleError, KeyError, TypeError, AttributeError):
            return None

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def _clear(self) -> None:
        """Delete the files that belong to no finished block."""
        known = {JOB, *(self._path(index).name for index in range(len(self.records)))}
        named = {name for record in self.records for name in record.files}
        for folder in (self.folder, self.partial / "parts"):
            for file in folder.iterdir() if folder.is_dir() else ():
                ours = file.name in known or f"{folder.name}/{file.name}" in named
                if not ours:
                    file.unlink()


def activations_name(index: int, model: str = QUANTIZED) -> str:
    """Path below ``OUT.partial`` of the inputs of block `index` in the quantized or the full-precision model."""
    return f"journal/{model}-{index:05d}.f32"


def is_activations(name: str) -> bool:
    """Whether a path is one of `activations_name`."""
    return name.startswith((f"journal/{QUANTIZED}-", f"journal/{FULL}-"))


def finished_blocks(partial: Path) -> int:
    """Number of records of an unfinished job, without verifying them."""
    files = (partial / "journal").glob("block-*.json")
    return sum(not file.name.endswith(UNFINISHED_SUFFIX) for file in files)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refuse_differences(partial: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if earlier.get("journal") != now["journal"]:  # other topics of another version have other keys
        earlier, now = {"journal": earlier.get("journal")}, {"journal": now["journal"]}
    flat = [{f"{topic} {key}": value for topic, values in job.items() if isinstance(values, Mapping)
             for key, value in values.items()} for job in (earlier, now)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    if names:
        shown = "; ".join(f"{name} {_shown(flat[0].get(name))} then, {_shown(flat[1].get(name))} now" for name in names)
        raise UsageError(f"{partial} holds an unfinished job that differs: {shown}",
                         "Give the same source and settings to resume it, or --restart to start over.")


def _shown(value: Any) -> str:
    if value is None:
        return "(none)"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
