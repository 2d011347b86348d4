"""Checkpoints of end-to-end tuning, from which an interrupted job resumes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gptq_belle.checkpoint.reader import read_json
from gptq_belle.checkpoint.safetensors_file import TensorFile, write_tensors
from gptq_belle.common.files import FileChecksum, matches_checksum, write_json_atomically
from gptq_belle.errors import GptqBelleError

FILE_PREFIX = "tuning-checkpoint"


class TuningState(NamedTuple):
    """Content of a checkpoint."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


class TuningCheckpoint:
    """The latest checkpoint in a folder.

    Args:
        origin: identifies the inputs of tuning, JSON-ready, such as checksums; checkpoints of other inputs are ignored.
    """

    def __init__(self, folder: Path, origin: Any) -> None:
        self.folder, self.origin = folder, json.loads(json.dumps(origin))  # as JSON returns it: tuples become lists
        self._record = folder / f"{FILE_PREFIX}.json"

    def save(self, step: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Replace the checkpoint durably: after this returns, it survives a crash and a power cut."""
        name = f"{FILE_PREFIX}-{step:06d}.safetensors"
        stamp = write_tensors(self.folder / name, tensors)
        write_json_atomically(self._record, {"origin": self.origin, "step": step, "state": state, "file": name,
                                          "stamp": stamp})
        for file in self.folder.glob(f"{FILE_PREFIX}-*"):
            if file.name != name:
                file.unlink()

    def load(self) -> TuningState | None:
        """The latest checkpoint; None where there is none, or where it is damaged or of other inputs."""
        try:
            record = read_json(self._record)
            path = self.folder / record["file"]
            if record["origin"] != self.origin or not matches_checksum(path, FileChecksum(*record["stamp"])):
                return None
            file = TensorFile(path)
            return TuningState(record["step"], record["state"], {name: file.tensor(name) for name in file.names()})
        except (GptqBelleError, OSError, KeyError, TypeError):
            return None
