"""Read and write safetensors files in pieces; the safetensors library validates headers.

Data is read through a file descriptor instead of the library's memory map: if a file becomes shorter, a map raises
SIGBUS, a read an error with the name of the tensor; and a map can neither bypass the page cache (see `direct_io`) nor
fill memory of the caller. Files are written without `save_file`, which needs all tensors of a file in memory (an
embedding has 2 GB, a shard 5 GB), computes no checksum, and reports a full disk only as text.
"""

import json
import math
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_belle.checkpoint.direct_io import FileBytes, byte_view, read_error
from gptq_belle.common.files import AtomicFile, FileChecksum
from gptq_belle.errors import InputError, from_os_error
from gptq_belle.kernels.huge_pages import Allocator, empty_bytes

DAMAGED = "The file is damaged or incomplete: fetch or copy it again."
CHUNK_BYTES = 16 << 20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorEntry(NamedTuple):
    """Header entry of a tensor: dtype in the format's spelling, shape, and byte range begin..end in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """One .safetensors file: the header is read and validated on creation, tensors are read on request.

    Attributes:
        entries: header entries by tensor name, in the order of their data.
    Raises:
        InputError: the file is not valid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise _damaged(path, "it is not a regular file")
            self._bytes = FileBytes(path)
            self.entries = _read_entries(path, self._bytes)
        except OSError as error:
            raise from_os_error(error) or _damaged(path, str(error.strerror or error)) from error

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return DTYPES[self.entries[name].dtype]

    def nbytes(self, name: str) -> int:
        """Size of a tensor in bytes."""
        return self.entries[name].end - self.entries[name].begin

    def tensor(self, name: str, allocator: Allocator = empty_bytes) -> Tensor:
        """Read one tensor.

        Args:
            allocator: allocates memory (size,) uint8 for a number of bytes.
        Raises:
            InputError: the file ends before the tensor does.
        """
        entry = self.entries[name]
        with self._errors_with_name(name):
            found = self._bytes.read(entry.begin, entry.end - entry.begin, allocator, self.dtype(name).itemsize)
        return found.view(self.dtype(name)).view(entry.shape)

    def rows(self, name: str, indices: Iterable[int], allocator: Allocator = empty_bytes) -> Tensor:
        """Read some rows of a tensor, in the given order; see `tensor` for `allocator`.

        Raises:
            InputError: see `tensor`.
            IndexError: the tensor does not have such a row.
        """
        entry, chosen = self.entries[name], list(indices)
        if any(not 0 <= row < entry.shape[0] for row in chosen):
            raise IndexError(f"{name} has {entry.shape[0]} rows")
        size = (entry.end - entry.begin) // max(1, entry.shape[0])
        with self._errors_with_name(name):
            found = self._bytes.pieces(entry.begin, size, chosen, allocator, self.dtype(name).itemsize)
        return found.view(self.dtype(name)).view(len(chosen), *entry.shape[1:])

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Read the bytes of a tensor in chunks of at most CHUNK_BYTES; raises InputError like `tensor`."""
        entry = self.entries[name]
        for begin in range(entry.begin, entry.end, CHUNK_BYTES):
            with self._errors_with_name(name):
                piece = self._bytes.read(begin, min(CHUNK_BYTES, entry.end - begin), empty_bytes)
            yield byte_view(piece)

    def prefetch(self, name: str) -> None:
        """Read a tensor's bytes into the page cache."""
        self._bytes.fill_cache(self.entries[name].begin, self.entries[name].end)

    @contextmanager
    def _errors_with_name(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError) as error:
            raise read_error(error, name, self.path, partial(_damaged, self.path)) from error


def _read_entries(path: Path, file: FileBytes) -> dict[str, TensorEntry]:
    """Read the header; in a valid file, tensors have no gaps and fill it to the end, so sizes determine offsets."""
    size = file.size()
    try:
        with safe_open(file.path, framework="numpy") as header:
            slices = {name: header.get_slice(name) for name in header.offset_keys()}
            found = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise _damaged(path, str(error)[:200]) from error
    if unknown := [name for name, (dtype, _) in found.items() if dtype not in DTYPES]:
        raise _damaged(path, f"tensor {unknown[0][:100]} has dtype {found[unknown[0]][0]}, which is not supported")
    sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, (dtype, shape) in found.items()}
    begin, entries = size - sum(sizes.values()), dict[str, TensorEntry]()
    if file.size() != size:
        raise _damaged(path, "its size changed while it was read")
    for name, (dtype, shape) in found.items():
        entries[name] = TensorEntry(dtype, shape, begin, begin + sizes[name])
        begin += sizes[name]
    return entries


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileChecksum:
    """Write one .safetensors file atomically, without copying all tensors."""
    entries = {name: TensorEntry(NAMES[t.dtype], tuple(t.shape), 0, t.nbytes) for name, t in tensors.items()}
    with AtomicFile(path) as file:
        file.write(header_bytes(entries))
        for tensor in tensors.values():
            file.write(byte_view(tensor.detach().cpu().contiguous()))
    return file.checksum


def write_rows(path: Path, name: str, shape: tuple[int, ...], rows: Iterable[Tensor],
               dtype: torch.dtype = torch.float16) -> FileChecksum:
    """Write a .safetensors file with one tensor of `dtype` from chunks of its rows."""
    with AtomicFile(path) as file:
        file.write(header_bytes({name: TensorEntry(NAMES[dtype], shape, 0, dtype.itemsize * math.prod(shape))}))
        for piece in rows:
            file.write(byte_view(piece.to(dtype).contiguous()))
    return file.checksum


def header_bytes(tensors: Mapping[str, TensorEntry]) -> bytes:
    """Encode the header, including its length, of a file with these tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, begin, end) in tensors.items():
        size = end - begin
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} cannot be read as safetensors: {reason}", DAMAGED)
