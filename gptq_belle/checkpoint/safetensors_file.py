"""The safetensors format with nothing taken on trust: an 8-byte length, a JSON header, bytes without gaps.

github.com/huggingface/safetensors, "Format". Tensors are read, not mapped: a mapped file that shrinks ends the process
with SIGBUS, and a short read can be told to the user.
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from gptq_belle.checkpoint.direct_io import FileBytes, raw, unread
from gptq_belle.common.files import DurableFile, Stamp
from gptq_belle.errors import InputError, from_system
from gptq_belle.kernels.huge_pages import Allocator, empty_bytes

DAMAGED = "The file is damaged or incomplete: fetch or copy it again."
MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it
CHUNK_BYTES = 16 << 20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorEntry(NamedTuple):
    """Where one tensor lies: its dtype by the format's name, its shape, and its bytes begin..end in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """One .safetensors file: the header is read and checked at once, tensors when asked for.

    Raises:
        InputError: it is not such a file; the message says what is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise _damaged(path, "it is not a plain file")
            self._bytes = FileBytes(path)
            with self._bytes.from_beginning() as file:
                self.entries = _read_header(path, file)
        except OSError as error:
            raise from_system(error) or _damaged(path, str(error.strerror)) from error

    def names(self) -> list[str]:
        """All tensors, in the header's order."""
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return DTYPES[self.entries[name].dtype]

    def tensor(self, name: str, memory: Allocator = empty_bytes) -> Tensor:
        """One tensor, in memory of its own.

        Args:
            name: of the tensor.
            memory: gives so many bytes, (size,) uint8.
        Raises:
            InputError: the file ends before the tensor does.
        """
        entry = self.entries[name]
        with self._named(name):
            found = self._bytes.read(entry.begin, entry.end - entry.begin, memory, self.dtype(name).itemsize)
        return found.view(self.dtype(name)).view(entry.shape)

    def rows(self, name: str, indices: Iterable[int], memory: Allocator = empty_bytes) -> Tensor:
        """Some rows of a tensor, in the order asked for; the others are not read. `memory` as of `tensor`.

        Raises:
            InputError: as `tensor`.
            IndexError: a row that the tensor does not have.
        """
        entry, chosen = self.entries[name], list(indices)
        if any(not 0 <= row < entry.shape[0] for row in chosen):
            raise IndexError(f"{name} has {entry.shape[0]} rows")
        size = (entry.end - entry.begin) // max(1, entry.shape[0])
        with self._named(name):
            found = self._bytes.pieces(entry.begin, size, chosen, memory, self.dtype(name).itemsize)
        return found.view(self.dtype(name)).view(len(chosen), *entry.shape[1:])

    def prefetch(self, name: str) -> None:
        """Bring a tensor's bytes into the system's cache."""
        self._bytes.fill_cache(self.entries[name].begin, self.entries[name].end)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError) as error:
            raise unread(error, name, self.path, partial(_damaged, self.path)) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Stamp:
    """Write one .safetensors file, whole or not there; no second copy of the tensors is made."""
    with DurableFile(path) as file:
        file.write(header_bytes({name: (NAMES[t.dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()}))
        for tensor in tensors.values():
            file.write(raw(tensor.detach().cpu().contiguous()))
    return file.stamp


def write_rows(path: Path, name: str, shape: tuple[int, ...], rows: Iterable[Tensor],
               dtype: torch.dtype = torch.float16) -> Stamp:
    """Write a file of one tensor of `dtype` that comes in pieces of some rows each."""
    with DurableFile(path) as file:
        file.write(header_bytes({name: (NAMES[dtype], shape, dtype.itemsize * math.prod(shape))}))
        for piece in rows:
            file.write(raw(piece.to(dtype).contiguous()))
    return file.stamp


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """Length and header of a file that holds tensors (dtype name, shape, bytes) one behind the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path, file: Any) -> dict[str, TensorEntry]:
    """Every tensor's entry; each is in bounds, of the size that dtype and shape say, and none overlaps another."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
        raise _damaged(path, f"it states a header of {length} bytes, and has {size} in all")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {str(error)[:200]}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise _damaged(path, f"tensor {name[:100]} begins at byte {entry.begin}, where {at} was due")
        at = entry.end
    if at != size:
        raise _damaged(path, f"its tensors end at byte {at}, the file at {size}")
    return entries


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    shown = f"tensor {name[:100]}"
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        raise _damaged(path, f"{shown} has no dtype")
    if value["dtype"] not in DTYPES:
        raise _damaged(path, f"{shown} is of dtype {value['dtype'][:20]!r}, which is not supported")
    shape, offsets = (value.get(key) for key in ("shape", "data_offsets"))
    if not (_whole_numbers(shape) and _whole_numbers(offsets)) or len(offsets) != 2:
        raise _damaged(path, f"{shown} has no proper shape and offsets")
    size = math.prod(shape) * DTYPES[value["dtype"]].itemsize
    if offsets[1] - offsets[0] != size or len(shape) > 64:
        raise _damaged(path, f"{shown} has {offsets[1] - offsets[0]} bytes, its shape needs {size}")
    return TensorEntry(value["dtype"], tuple(shape), start + offsets[0], start + offsets[1])


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} cannot be read as safetensors: {reason}", DAMAGED)
