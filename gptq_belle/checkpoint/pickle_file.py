"""Read PyTorch's .bin and .pt files by `torch.load(weights_only=True)`, which runs no code.

Files of torch 1.6 and later are zip archives and are memory-mapped; older files are read at once. A tensor is copied
from the map on request, after checking the size of the file: reading a page that no longer exists raises SIGBUS.
"""

import pickle
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from gptq_belle.checkpoint.direct_io import PAGE, FileBytes, read_error
from gptq_belle.checkpoint.safetensors_file import DAMAGED
from gptq_belle.errors import InputError, from_os_error
from gptq_belle.kernels.huge_pages import Allocator, empty_bytes


class PickleFile:
    """One .bin or .pt file.

    Raises:
        InputError: it is damaged, or contains anything except tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise self._damaged("it is not a regular file")
        try:
            self._bytes = FileBytes(path)
            self._size = self._bytes.size()
            zipped = zipfile.is_zipfile(self._bytes.path)
            records = _record_sizes(self._bytes.path) if zipped else None
            state = torch.load(self._bytes.path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            raise InputError(f"{path} contains more than tensors, and loading it could run code",
                             "If you trust it, convert it to safetensors; otherwise fetch the original.") from error
        except OSError as error:
            raise from_os_error(error) or self._damaged(str(error.strerror)) from error
        except Exception as error:  # the restricted unpickler raises anything for damaged bytes
            reason = (str(error) or "it ends too early").splitlines()[0].split(". ")[0]
            raise self._damaged(reason[:200]) from error
        if not isinstance(state, dict) or not all(
                isinstance(k, str) and type(v) in (Tensor, torch.nn.Parameter) and v.layout == torch.strided
                for k, v in state.items()):
            raise InputError(f"{path} is not a flat dictionary of tensors", "Only state dictionaries can be read.")
        self._state: dict[str, Tensor] = {name: tensor.detach() for name, tensor in state.items()}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
        if records is not None and Counter(size for size in storages.values() if size) - records:
            raise self._damaged("a tensor is compressed, or larger than its data in the file")

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._state[name].dtype

    def tensor(self, name: str, allocator: Allocator = empty_bytes) -> Tensor:
        """Read one tensor; see `TensorFile.tensor` for `allocator`.

        Raises:
            InputError: the file has become shorter.
        """
        return self._copy(name, self._state[name], allocator)

    def rows(self, name: str, indices: Iterable[int], allocator: Allocator = empty_bytes) -> Tensor:
        """Read some rows of a tensor, in the given order; see `TensorFile.tensor` for `allocator`.

        Raises:
            InputError: the file has become shorter.
            IndexError: the tensor does not have such a row.
        """
        chosen, count = list(indices), self.shape(name)[0]
        if any(not 0 <= row < count for row in chosen):
            raise IndexError(f"{name} has {count} rows")
        if chosen and chosen == list(range(chosen[0], chosen[0] + len(chosen))):
            return self._copy(name, self._state[name][chosen[0] : chosen[-1] + 1], allocator)
        self._check_size(name)
        return self._state[name][chosen]

    def prefetch(self, name: str) -> None:
        """Read a tensor's bytes into the page cache, by touching every page of its memory map."""
        tensor = self._state[name]
        if tensor.is_contiguous():
            self._check_size(name)
            tensor.view(-1)[:: max(1, PAGE // tensor.element_size())].clone()

    def _copy(self, name: str, mapped: Tensor, allocator: Allocator) -> Tensor:
        self._check_size(name)
        try:
            memory = allocator(mapped.nbytes)
        except OSError as error:
            raise read_error(error, name, self.path, self._damaged) from error
        return memory.view(mapped.dtype).view(mapped.shape).copy_(mapped)

    def _check_size(self, name: str) -> None:
        if self._bytes.size() < self._size:
            raise self._damaged(f"tensor {name[:100]}: the file ends inside it; it became shorter while it was read")

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"{self.path} cannot be read as a PyTorch file: {reason}", DAMAGED)


def _record_sizes(path: str) -> Counter[int]:
    """Sizes of the uncompressed records of an archive: every storage must be one, which mmap does not check."""
    with zipfile.ZipFile(path) as archive:
        return Counter(info.file_size for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED)
