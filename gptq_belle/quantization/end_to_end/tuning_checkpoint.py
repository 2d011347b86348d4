"""Where a long phase behind the blocks has got to, on disk: whole or not there, and of the job that finds it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gptq_belle.checkpoint.reader import read_json
from gptq_belle.checkpoint.safetensors_file import TensorFile, write_tensors
from gptq_belle.common.files import FileChecksum, matches_checksum, write_json_atomically
from gptq_belle.errors import GptqBelleError

PREFIX = "savepoint"


class Saved(NamedTuple):
    """What a savepoint holds."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


class Savepoint:
    """One place in a folder, written over as a phase goes on.

    Args:
        folder: that the job keeps.
        origin: what the phase began with, JSON-ready, such as checksums; a savepoint of another one counts for nothing.
    """

    def __init__(self, folder: Path, origin: Any) -> None:
        self.folder, self.origin = folder, json.loads(json.dumps(origin))  # as it is read back: tuples are lists
        self._record = folder / f"{PREFIX}.json"

    def save(self, step: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep this; when it returns, neither a crash nor a power cut undoes it. What was saved before goes then."""
        name = f"{PREFIX}-{step:06d}.safetensors"
        stamp = write_tensors(self.folder / name, tensors)
        write_json_atomically(self._record, {"origin": self.origin, "step": step, "state": state, "file": name,
                                          "stamp": stamp})
        for file in self.folder.glob(f"{PREFIX}-*"):
            if file.name != name:
                file.unlink()

    def load(self) -> Saved | None:
        """What was saved last; None where nothing is, or nothing that can be used."""
        try:
            record = read_json(self._record)
            path = self.folder / record["file"]
            if record["origin"] != self.origin or not matches_checksum(path, FileChecksum(*record["stamp"])):
                return None
            file = TensorFile(path)
            return Saved(record["step"], record["state"], {name: file.tensor(name) for name in file.names()})
        except (GptqBelleError, OSError, KeyError, TypeError):
            return None
