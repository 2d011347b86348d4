"""Read a Hugging Face model directory tensor by tensor, from safetensors or .bin files."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.pickle_file import PickleFile
from gptq_belle.checkpoint.safetensors_file import CHUNK_BYTES, DAMAGED, TensorFile
from gptq_belle.common.files import reject_lfs_pointer
from gptq_belle.errors import InputError, from_os_error, one_line
from gptq_belle.formats.foreign_config import GPTQ, linear_layout
from gptq_belle.formats.foreign_linears import DerivedTensor, derived_tensors
from gptq_belle.formats.quantize_config import parse_quantization
from gptq_belle.kernels.huge_pages import Allocator, empty_bytes
from gptq_belle.models.architectures import LM_HEAD, Architecture, family
from gptq_belle.models.belle_catalogue import CONFIGS, find_belle_model
from gptq_belle.models.discovery import architecture, model_class

MAX_JSON_BYTES = 64 << 20  # the largest known file, the index of a model with 1,000 shards, is below 20 MB


class CheckpointReader:
    """A model directory: config.json, and tensors that are read from disk by name on request.

    Tensor names have the prefix of the base model (``transformer.`` for BLOOM), even if they lack it in the files.
    Packed linears of compressed-tensors and AWQ appear as GPTQ's tensors, which are computed when they are read.

    Args:
        path: the directory.
        weights: weight files; default: those of the directory.

    Attributes:
        path: the directory.
        config: config.json as a dictionary.

    Raises:
        InputError: the directory, config.json or a weight file is missing or damaged, or the architecture is unknown.
    """

    def __init__(self, path: str | Path, weights: Sequence[Path] | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise unconverted_checkpoint_error(self.path) or InputError(
                f"{self.path} is not a model directory", "Give a folder with config.json.")
        if not (self.path / "config.json").exists() and (hint := unconverted_checkpoint_error(self.path)):
            raise hint
        self.config = read_json(self.path / "config.json")
        self._prefix = model_class(self.config).base_model_prefix
        self._shards = {file: _open(file) for file in weights or weight_files(self.path)}
        listed = [(name, file) for file, shard in self._shards.items() for name in shard.names()]
        if twice := next((name for name, count in Counter(name for name, _ in listed).items() if count > 1), None):
            files = " and ".join(file.name for name, file in listed if name == twice)
            raise InputError(f"{self.path} holds the tensor {twice} twice: in {files}",
                             "Shards of two checkpoints are mixed: fetch the directory again.")
        bare = not any(name.startswith(self._prefix + ".") for name, _ in listed)
        self._where = {self._module_name(name, bare): (file, name) for name, file in listed}
        self._derived, replaced = self._derived_tensors()
        self._names = dict.fromkeys([*(name for name in self._where if name not in replaced), *self._derived])

    @cached_property
    def arch(self) -> Architecture:
        """The architecture that config.json describes.

        Raises:
            InputError: see `models.discovery.architecture`.
        """
        return architecture(self.config)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    @property
    def packed_linear_names(self) -> list[str]:
        """Full names of the packed linears."""
        return [name.removesuffix(".qweight") for name in self if name.endswith(".qweight")]

    def is_packed(self, name: str) -> bool:
        """Whether the files contain any packed tensor of a linear; reading the missing ones raises InputError."""
        return any(f"{name}.{part}" in self for part in ("qweight", "qzeros", "scales"))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header of the file."""
        if name in self._derived:
            return self._derived[name].shape
        file, stored = self._find(name)
        return self._shards[file].shape(stored)

    def tensor(self, name: str, allocator: Allocator = empty_bytes) -> Tensor:
        """Read one tensor on the CPU, in the dtype of the file.

        Args:
            allocator: allocates the memory of the tensor.
        Raises:
            InputError: the tensor is missing or cannot be read.
        """
        if (derived := self._derived.get(name)) is not None:
            file, stored = self._where[derived.source]
            return derived.compute(self._shards[file].tensor(stored, empty_bytes))
        file, stored = self._find(name)
        return self._shards[file].tensor(stored, allocator)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header of the file."""
        if name in self._derived:
            return self._derived[name].dtype
        file, stored = self._find(name)
        return self._shards[file].dtype(stored)

    def nbytes(self, name: str) -> int:
        """Size of a tensor in bytes, from the header of the file."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def rows(self, name: str, indices: Iterable[int], allocator: Allocator = empty_bytes) -> Tensor:
        """Read some rows of a matrix, in the given order.

        Raises:
            InputError: see `tensor`; the matrix does not have such a row.
        """
        if name in self._derived:
            return self.tensor(name)[list(indices)]
        file, stored = self._find(name)
        try:
            return self._shards[file].rows(stored, indices, allocator)
        except IndexError as error:
            raise InputError(f"{self.path}: a token id is outside the {self.shape(name)[:1]} rows of {name}",
                             "The tokenizer belongs to another model: fetch the directory again.") from error

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in chunks of rows of at most CHUNK_BYTES (but at least one row).

        Raises:
            InputError: see `tensor`.
        """
        if not self.shape(name):
            yield self.tensor(name)
            return
        count, *rest = self.shape(name)
        step = max(1, CHUNK_BYTES // (max(1, math.prod(rest)) * self.dtype(name).itemsize))
        for begin in range(0, count, step):
            yield self.rows(name, range(begin, min(begin + step, count)))

    def prefetch(self, name: str) -> None:
        """Read a tensor into the page cache; errors are ignored here, because `tensor` raises them."""
        file, stored = self._where[self._derived[name].source] if name in self._derived else self._find(name)
        with suppress(OSError):
            self._shards[file].prefetch(stored)

    @property
    def files(self) -> list[Path]:
        """Weight files in order."""
        return list(self._shards)

    def bytes_on_disk(self) -> int:
        """Total size of the weight files in bytes."""
        return sum(file.stat().st_size for file in self._shards)

    def _derived_tensors(self) -> tuple[dict[str, DerivedTensor], set[str]]:
        """GPTQ's tensors of linears in another layout, and the tensors of the files that they replace."""
        stated = self.config.get("quantization_config") or {}
        if (layout := linear_layout(stated)) == GPTQ:
            return {}, set()

        def header(name: str) -> tuple[tuple[int, ...], torch.dtype]:
            file, stored = self._where[name]
            return self._shards[file].shape(stored), self._shards[file].dtype(stored)

        try:
            quantization = parse_quantization(stated, self.path)
            return derived_tensors(self._where, header, layout,
                                   lambda name: quantization.for_linear(name) or quantization)
        except InputError:  # of the settings: `read_quantization` raises it where they are needed
            return {}, set()

    def _module_name(self, name: str, bare: bool) -> str:
        """Name of a tensor in the model; `bare` files lack the prefix of the base model."""
        stem, _, leaf = name.rpartition(".")
        if stem in (LM_HEAD, family(self.config["model_type"]).head):
            return f"{LM_HEAD}.{leaf}"
        return f"{self._prefix}.{name}" if bare else name

    def _find(self, name: str) -> tuple[Path, str]:
        if name not in self._names:
            raise InputError(f"{self.path} lacks the tensor {name}",
                             "A shard is missing, or config.json belongs to another model: fetch the directory again.")
        return self._where[name]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains one object.

    Raises:
        InputError: the file is missing, not a regular file, too large, not UTF-8, not JSON, or not an object.
    """
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > MAX_JSON_BYTES):
            raise InputError(f"{path} is not a regular file of at most {MAX_JSON_BYTES >> 20} MiB", DAMAGED)
        reject_lfs_pointer(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing", "Give a complete Hugging Face model directory.") from error
    except OSError as error:
        raise from_os_error(error) or InputError(f"{path} cannot be read: {error.strerror}", DAMAGED) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {one_line(error)}", DAMAGED) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not contain a JSON object", DAMAGED)
    return value


def weight_files(path: Path) -> list[Path]:
    """Find the weight files of a model directory: by index, else the usual file name, else the only weight file.

    Raises:
        InputError: there is none, there are several without an index, or a file of the index is missing.
    """
    for kind in ("model.safetensors", "pytorch_model.bin"):
        if (path / f"{kind}.index.json").is_file():
            return _indexed_files(path / f"{kind}.index.json")
        if (path / kind).is_file():
            return [path / kind]
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if len(found) != 1:
        raise (None if found else unconverted_checkpoint_error(path)) or InputError(
            f"{path} contains {len(found)} weight files and no index",
            "Expected model.safetensors, shards with model.safetensors.index.json, or pytorch_model.bin.")
    return found


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index} has no weight_map from tensor names to file names", DAMAGED)
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"{index} names a file outside its folder: {name!r}", "Do not use this directory.")
        if not (index.parent / name).is_file():
            raise InputError(f"shard {index.parent / name} is missing", f"{index.name} names it: fetch it again.")
        files.append(index.parent / name)
    return files


def _open(path: Path) -> TensorFile | PickleFile:
    reject_lfs_pointer(path)
    return TensorFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def read_config(model: str | Path) -> dict[str, Any]:
    """Read the config.json of a directory, a JSON file, or a configuration of the BELLE catalogue by name.

    Raises:
        InputError: it is missing or damaged.
    """
    path, found = Path(model), find_belle_model(str(model))
    if not path.exists() and (found or str(model) in CONFIGS):
        return deepcopy(CONFIGS[found.config if found else str(model)])
    if not path.exists():
        raise InputError(f"{model} is neither a model directory nor a known name",
                         f"Give a folder with config.json, or one of {', '.join(CONFIGS)}.")
    return read_json(path / "config.json" if path.is_dir() else path)


def unconverted_checkpoint_error(path: Path) -> InputError | None:
    """Build the error for an encrypted or legacy checkpoint, which must be converted first; None for other paths."""
    files = [path] if path.is_file() else sorted(path.glob("*.enc")) + sorted(path.glob("*.pt"))
    last = {file.suffix: file for file in files if file.is_file()}
    if ".enc" in last:
        return InputError(f"{path} is encrypted",
                          f"First: gptq-belle decrypt {path} OUT --key path/to/consolidated.00.pth")
    if ".pt" in last:
        return InputError(f"{path} is a legacy checkpoint that must be converted first",
                          f"First: gptq-belle convert {path} OUT")
    return None
