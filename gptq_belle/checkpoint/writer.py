"""Write a model directory so that it appears whole or not at all: parts as they come, one merge, one rename.

Tensors arrive block by block and are kept as small safetensors files under ``OUT.partial/parts``; at the end they are
copied, header first, into files of at most 5 GB. The safetensors format is an 8-byte length, that many bytes of JSON
header, and the tensors' bytes without gaps (github.com/huggingface/safetensors, "Format").
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gptq_belle.checkpoint.reader import read_json
from gptq_belle.config import written_by_us
from gptq_belle.errors import InputError, UsageError

SHARD_BYTES = 5_000_000_000
COPY_BYTES = 16 << 20
ELEMENT_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class _Entry(NamedTuple):
    """Where one tensor lies in a part."""

    name: str
    dtype: str
    shape: list[int]
    file: Path
    begin: int
    end: int


class CheckpointWriter:
    """A context in which a checkpoint directory comes into being; leaving it early removes what was written.

    Args:
        out: the final directory. It may exist when it is empty or was written by gptq_belle; it is then replaced.
        shard_bytes: largest weight file, in bytes.

    Raises:
        UsageError: `out` exists and is not ours.
    """

    def __init__(self, out: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.out = Path(out).absolute()
        self.shard_bytes = shard_bytes
        check_output(self.out)
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.parts = self.partial / "parts"
        self.files = self.partial / "files"

    def __enter__(self) -> Self:
        if self.partial.exists():
            if not self.parts.is_dir():
                raise UsageError(f"{self.partial} exists and was not left by a quantization job", "Move it away.")
            os.close(_locked(self.partial))
            shutil.rmtree(self.partial)
        self.parts.mkdir(parents=True)
        self.files.mkdir()
        self._lock = _locked(self.partial)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)

    def add(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors on disk under the name of a part; they may be dropped from memory then."""
        try:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, self.parts / part)
        except SafetensorError as error:  # the library wraps the system's errors; a full disk should be called that
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(self.parts / part)) from error

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """One JSON file of the directory."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """One text file of the directory."""
        (self.files / name).write_text(content, encoding="utf-8")

    def merge(self) -> None:
        """Join the parts into ``model.safetensors``, or into shards and their index."""
        shards = _shards(_entries(self.parts), self.shard_bytes)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        for name, entries in zip(names, shards, strict=True):
            _write_shard(self.files / name, entries)
        if len(shards) > 1:
            where = {entry.name: name for name, entries in zip(names, shards, strict=True) for entry in entries}
            total = sum(entry.end - entry.begin for entries in shards for entry in entries)
            self.write_json("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})

    def publish(self) -> None:
        """Give the finished directory its final name; what stood there before goes only now."""
        for file in self.files.iterdir():
            _sync(file)
        if self.out.exists():
            old = self.partial / "replaced"
            self.out.rename(old)
        self.files.rename(self.out)
        _sync(self.out.parent)


def _locked(folder: Path) -> int:
    """An open handle of a folder that only this process holds; the system lets it go when the process ends.

    Raises:
        UsageError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UsageError(f"another job is writing {folder}", "Wait for it, or choose another output.") from error
    return handle


def check_output(out: Path) -> None:
    """Refuse an output directory that somebody else's files stand in.

    Raises:
        UsageError: it exists, is not empty, and no quantize_config.json in it names gptq_belle.
    """
    if not out.exists() and not out.is_symlink():
        return
    ours = out / "quantize_config.json"
    replaceable = out.is_dir() and not out.is_symlink()
    if replaceable and (not any(out.iterdir()) or (ours.is_file() and written_by_us(read_json(ours)))):
        return
    raise UsageError(f"{out} exists and was not written by gptq_belle", "Choose another output, or move it away.")


def _entries(parts: Path) -> list[_Entry]:
    entries = []
    for file in sorted(parts.iterdir()):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        for name, value in header.items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in value["data_offsets"])
                entries.append(_Entry(name, value["dtype"], value["shape"], file, begin, end))
    return entries


def _shards(entries: list[_Entry], limit: int) -> list[list[_Entry]]:
    """Cut into files in the model's order; within a file, wide elements first, so that all are aligned."""
    shards: list[list[_Entry]] = [[]]
    used = 0
    for entry in entries:
        size = entry.end - entry.begin
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size
    return [sorted(shard, key=lambda entry: -ELEMENT_BYTES[entry.dtype]) for shard in shards]


def _write_shard(path: Path, entries: list[_Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        size = entry.end - entry.begin
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            _copy(entry, out)


def _copy(entry: _Entry, out: Any) -> None:
    with entry.file.open("rb") as source:
        source.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            chunk = source.read(min(left, COPY_BYTES))
            if not chunk:
                raise InputError(f"{entry.file} shrank while it was read", "Something else writes there; run it again.")
            out.write(chunk)
            left -= len(chunk)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
