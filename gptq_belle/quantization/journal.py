"""What a job has finished, on disk: a restart goes on behind the last finished block.

``OUT.partial/journal`` holds ``job.json``, the fingerprint of source, calibration and settings, and a record
``block-NNNNN.json`` a finished block. A record is written last, when every file that it names is on the disk, and holds
their sizes and checksums: the block's packed tensors (``parts/``), the activations behind it, and tensors of other
kinds (`Record.tensors`). Files without a record, and records whose files are not whole, count for nothing.
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
from gptq_belle.quantization.end_to_end.savepoint import PREFIX
from gptq_belle.quantization.report import LinearReport

JOB = "job.json"
VERSION = 3
QUANTIZED, FULL = "hidden", "full"  # the models whose activations are kept


@dataclass(slots=True)
class Record:
    """One finished block.

    Attributes:
        linears: its rows of the report, in the order of solving.
        phases: seconds by what they went into; "total" is all of the block.
        peak_memory: of the job so far, in bytes.
        notes: what the report should say of it, such as a retreat to the CPU.
        state: whatever else belongs to the block, JSON-ready.
        files: stamps of its files, by path below ``OUT.partial``.
    """

    linears: list[LinearReport] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    notes: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileChecksum] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of asdict.

        Raises:
            TypeError, AttributeError, KeyError: it is none.
        """
        linears = [LinearReport(**row) for row in value["linears"]]
        files = {name: FileChecksum(*stamp) for name, stamp in value["files"].items()}
        return cls(**{**value, "linears": linears, "files": files})


class Journal:
    """The finished blocks of a job.

    Args:
        partial: ``OUT.partial``, held by this process.
        fingerprint: what the result follows from, by topic: source, calibration, settings.
        restart: drop what an earlier job left.

    Attributes:
        records: of the finished blocks, from the first one on; those of an earlier job were checked.
        environment: what does not change the result but in its last bits; as the job was begun.
        choice: what the job has measured and chosen before its first block, JSON-ready; None where nothing was.

    Raises:
        UsageError: an earlier job's fingerprint is another one; the differences are named.
    """

    def __init__(self, partial: Path, fingerprint: Mapping[str, Mapping[str, Any]], environment: Mapping[str, Any], *,
                 restart: bool = False) -> None:
        self.partial, self.folder = partial, partial / "journal"
        self.records: list[Record] = []
        self.environment = dict(environment)
        self.choice: dict[str, Any] | None = None
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        job = {"journal": {"version": VERSION}} | {topic: dict(values) for topic, values in fingerprint.items()}
        if (earlier := self._earlier()) is not None:
            self.environment = earlier.pop("environment", self.environment)
            self.choice = earlier.pop("choice", None)
            _refuse_differences(partial, earlier, job)
            self.records = list(self._whole_records())
        else:
            self.folder.mkdir(exist_ok=True)
            fsync(partial)
            write_json_atomically(self.folder / JOB, job | {"environment": self.environment})
        self._job = job
        self._clear()

    def choose(self, choice: dict[str, Any]) -> None:
        """Keep a choice on the disk: measuring again could end in other last bits, and in another choice."""
        write_json_atomically(self.folder / JOB, self._job | {"environment": self.environment, "choice": choice})
        self.choice = choice

    def commit(self, record: Record, files: Mapping[str, FileChecksum],
               tensors: Mapping[str, Tensor] | None = None) -> None:
        """A block is finished; when this returns, neither a crash nor a power cut undoes it.

        Args:
            record: of the block; its files are filled in.
            files: what was written durably for it, by path below ``OUT.partial``.
            tensors: further tensors to keep with it, see `tensors`.
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
        """The further tensors that were committed with a finished block."""
        name = f"journal/tensors-{index:05d}.safetensors"
        if name not in self.records[index].files:
            return {}
        file = TensorFile(self.partial / name)
        return {key: file.tensor(key) for key in file.names()}

    def _earlier(self) -> dict[str, Any] | None:
        """job.json of an earlier job, or None where nothing usable was left."""
        try:
            return read_json(self.folder / JOB)
        except GptqBelleError:
            return None

    def _whole_records(self) -> Iterator[Record]:
        """Records from the first block up to the first that is missing or damaged.

        Activations are kept behind the last finished block only; where those are damaged, nothing is left to go on
        from, and the job begins anew.
        """
        found: list[Record] = []
        while (record := self._read(len(found))) is not None:
            found.append(record)
        for place, record in enumerate(found):
            last = place == len(found) - 1
            for name, stamp in record.files.items():
                if (last or not is_activations(name)) and not matches_checksum(self.partial / name, stamp):
                    return
        yield from found

    def _read(self, index: int) -> Record | None:
        try:
            value = read_json(self._path(index))
            checksum = value.pop("checksum")
            return Record.from_dict(value) if checksum == _checksum(value) else None
        except (GptqBelleError, KeyError, TypeError, AttributeError):
            return None

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def _clear(self) -> None:
        """Remove what belongs to no finished block."""
        known = {JOB, *(self._path(index).name for index in range(len(self.records)))}
        named = {name for record in self.records for name in record.files}
        for folder in (self.folder, self.partial / "parts"):
            for file in folder.iterdir() if folder.is_dir() else ():
                ours = file.name in known or f"{folder.name}/{file.name}" in named
                if not ours and not (self.records and file.name.startswith(PREFIX)):
                    file.unlink()


def activations_name(index: int, model: str = QUANTIZED) -> str:
    """Path below ``OUT.partial`` of the activations in front of block `index`, in the quantized or the full model."""
    return f"journal/{model}-{index:05d}.f32"


def is_activations(name: str) -> bool:
    """True for what `activations_name` gives."""
    return name.startswith((f"journal/{QUANTIZED}-", f"journal/{FULL}-"))


def finished_blocks(partial: Path) -> int:
    """How many records an unfinished job has left; they are not checked."""
    records = (partial / "journal").glob("block-*.json")
    return sum(not record.name.endswith(UNFINISHED_SUFFIX) for record in records)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refuse_differences(partial: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
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
