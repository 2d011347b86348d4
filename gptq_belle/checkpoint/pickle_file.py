"""PyTorch's .bin files: a pickle of names and storages, of which only plain tensors are taken, and nothing is run.

Since torch 1.6 such a file is a zip archive whose storages lie uncompressed: the pickle is read for shapes and offsets
alone, and a tensor's bytes when it is asked for. Older files are read whole.
"""

import os
import pickle
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.direct_io import FileBytes, unread
from gptq_belle.checkpoint.safetensors_file import DAMAGED
from gptq_belle.errors import InputError, from_system
from gptq_belle.kernels.huge_pages import Allocator, empty_bytes


class PickleFile:
    """One .bin file.

    Raises:
        InputError: it is damaged, or holds more than plain tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise self._unreadable("it is not a plain file")
        try:
            self._bytes = FileBytes(path)
            self._zipped = zipfile.is_zipfile(path)
            if self._zipped:
                self._check_archive()
            state = torch.load(path, map_location="meta" if self._zipped else "cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(f"{path} holds more than plain tensors, and loading it could run code",
                             "Convert it to safetensors where you trust it, or fetch the original.") from error
        except InputError:
            raise
        except OSError as error:
            raise from_system(error) or self._unreadable(str(error.strerror)) from error
        except Exception as error:  # the restricted unpickler trips over damaged bytes in every way that Python knows
            said = (str(error) or "it ends too early").splitlines()[0].split(". ")[0]
            raise self._unreadable(said[:200]) from error
        if not isinstance(state, dict) or not all(
                isinstance(k, str) and type(v) in (Tensor, torch.nn.Parameter) and v.layout == torch.strided
                for k, v in state.items()):
            raise InputError(f"{path} is not a flat dictionary of tensors", "Only state dictionaries can be read.")
        self._state: dict[str, Tensor] = state

    def names(self) -> list[str]:
        """All tensors."""
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._state[name].dtype

    def tensor(self, name: str, memory: Allocator = empty_bytes) -> Tensor:
        """One tensor; `memory` as of `TensorFile.tensor`.

        Raises:
            InputError: the file ends before the tensor does, or the tensor is larger than its storage.
        """
        return self._read(name, memory) if self._zipped else self._state[name].detach()

    def rows(self, name: str, indices: Iterable[int], memory: Allocator = empty_bytes) -> Tensor:
        """Some rows of a tensor, in the order asked for. `memory` as of `TensorFile.tensor`.

        Raises:
            InputError: as `tensor`.
            IndexError: a row that the tensor does not have.
        """
        chosen = list(indices)
        if any(not 0 <= row < self.shape(name)[0] for row in chosen):
            raise IndexError(f"{name} has {self.shape(name)[0]} rows")
        if not self._zipped or not self._state[name].is_contiguous():
            return self.tensor(name)[chosen]
        state = self._state[name]
        size, align = state[0].nbytes, state.element_size()
        with self._stored(name, int(state.storage_offset()) * align, state.nbytes) as begin:
            found = self._bytes.pieces(begin, size, chosen, memory, align)
        return found.view(state.dtype).view(len(chosen), *state.shape[1:])

    def prefetch(self, name: str) -> None:
        """Bring a tensor's bytes into the system's cache."""
        if self._zipped:
            skip, size = self._span(name)
            with self._stored(name, skip, size) as begin:
                self._bytes.fill_cache(begin, begin + size)

    def _read(self, name: str, memory: Allocator = empty_bytes) -> Tensor:
        meta, (skip, size) = self._state[name], self._span(name)
        with self._stored(name, skip, size) as begin:
            flat = self._bytes.read(begin, size, memory, meta.element_size())
        return flat.view(meta.dtype).as_strided(meta.shape, meta.stride())

    def _span(self, name: str) -> tuple[int, int]:
        """Where a tensor's bytes begin in its storage, and how many there are from its first to its last."""
        meta = self._state[name]
        last = sum((size - 1) * step for size, step in zip(meta.shape, meta.stride(), strict=True))
        return int(meta.storage_offset()) * meta.element_size(), (last + 1 if meta.numel() else 0) * meta.element_size()

    @contextmanager
    def _stored(self, name: str, skip: int, size: int) -> Iterator[int]:
        """Where in the file `size` bytes behind `skip` of a tensor's storage begin; reading them fails by name."""
        storage: Any = self._state[name].untyped_storage()
        if skip + size > self._records.get(storage._checkpoint_offset, 0):
            raise self._unreadable(f"tensor {name[:100]} is larger than what is stored of it")
        try:
            yield storage._checkpoint_offset + skip
        except (OSError, EOFError) as error:
            raise unread(error, name, self.path, self._unreadable) from error

    def _check_archive(self) -> None:
        """Note where every record begins and how long it is; a storage that is no record of its own is then refused."""
        self._records: dict[int, int] = {}
        reader: Any = torch._C.PyTorchFileReader(str(self.path))
        with zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED or info.header_offset + info.file_size > os.path.getsize(
                        self.path):
                    raise self._unreadable(f"its record {info.filename[:100]} is compressed or out of bounds")
                folder, _, record = info.filename.partition("/")
                if record.startswith("data/"):
                    self._records[reader.get_record_offset(record)] = info.file_size
                if record == "byteorder" and archive.read(info) != sys.byteorder.encode():
                    raise self._unreadable(f"it was written on a machine of other byte order in {folder[:100]}")

    def _unreadable(self, reason: str) -> InputError:
        return InputError(f"{self.path} cannot be read as a PyTorch file: {reason}", DAMAGED)
