"""Read a Hugging Face model directory tensor by tensor: safetensors shards, or .bin files through weights_only."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.pickle_file import PickleFile
from gptq_belle.checkpoint.safetensors_file import CHUNK_BYTES, DAMAGED, TensorFile
from gptq_belle.common.files import reject_lfs_pointer
from gptq_belle.errors import InputError, from_os_error
from gptq_belle.kernels.huge_pages import Allocator, empty_bytes
from gptq_belle.models.architectures import LM_HEAD, Architecture, architecture
from gptq_belle.models.belle_catalogue import CONFIGS, find_belle_model

MOST_JSON_BYTES = 64 << 20  # the largest real one, an index of a model of a thousand shards, is below 20 MB


class CheckpointReader:
    """A model directory: config.json and its tensors by name, each read from disk only when asked for.

    Tensor names always carry the base model's prefix (``transformer.`` for BLOOM), also where the source lacks it.

    Args:
        path: the directory.
        weights: weight files that lie elsewhere; left out, those of the directory.

    Attributes:
        path: the directory.
        config: config.json as a dictionary.
        arch: the row of the architecture table that ``model_type`` names.

    Raises:
        InputError: no such directory, no config.json, an unknown architecture, a missing or damaged file.
    """

    def __init__(self, path: str | Path, weights: Sequence[Path] | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise needs_conversion(self.path) or InputError(f"{self.path} is not a model directory",
                                                   "Give the folder that holds config.json.")
        if not (self.path / "config.json").exists() and (early := needs_conversion(self.path)):
            raise early
        self.config = read_json(self.path / "config.json")
        self.arch: Architecture = architecture(self.config.get("model_type"))
        self._shards = {file: _open(file) for file in weights or weight_files(self.path)}
        listed = [(name, file) for file, shard in self._shards.items() for name in shard.names()]
        bare = not any(name.startswith(self.arch.prefix + ".") for name, _ in listed)
        self._where = {self._with_prefix(name) if bare else name: (file, name) for name, file in listed}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    @property
    def packed_linear_names(self) -> list[str]:
        """Full names of the linears whose words the files hold."""
        return [name.removesuffix(".qweight") for name in self if name.endswith(".qweight")]

    def is_packed(self, name: str) -> bool:
        """Whether the files hold words, zeros or scales of a linear: who then asks for what is missing names it."""
        return any(f"{name}.{part}" in self for part in ("qweight", "qzeros", "scales"))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header alone."""
        file, stored = self._find(name)
        return self._shards[file].shape(stored)

    def tensor(self, name: str, memory: Allocator = empty_bytes) -> Tensor:
        """One tensor on the CPU, in the dtype of the file.

        Args:
            name: of the tensor.
            memory: where it is put.
        Raises:
            InputError: it is not there, or its bytes cannot be read.
        """
        file, stored = self._find(name)
        return self._shards[file].tensor(stored, memory)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the file, from the header alone."""
        file, stored = self._find(name)
        return self._shards[file].dtype(stored)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in the file, from the header alone."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def rows(self, name: str, indices: Iterable[int], memory: Allocator = empty_bytes) -> Tensor:
        """Some rows of a matrix, without the others in memory.

        Raises:
            InputError: as `tensor`; a row that the matrix does not have.
        """
        file, stored = self._find(name)
        try:
            return self._shards[file].rows(stored, indices, memory)
        except IndexError as error:
            raise InputError(f"{self.path}: token ids outside of the {self.shape(name)[:1]} rows of {name}",
                             "The tokenizer belongs to another model: fetch the directory again.") from error

    def chunks(self, name: str) -> Iterator[Tensor]:
        """One tensor in pieces of some rows each, none of which is large.

        Raises:
            InputError: as `tensor`.
        """
        if not self.shape(name):
            yield self.tensor(name)
            return
        count, *rest = self.shape(name)
        step = max(1, CHUNK_BYTES // (max(1, math.prod(rest)) * self.dtype(name).itemsize))
        for begin in range(0, count, step):
            yield self.rows(name, range(begin, min(begin + step, count)))

    def prefetch(self, name: str) -> None:
        """Bring a tensor's bytes into the system's cache; one that cannot be read is left for `tensor` to name."""
        file, stored = self._find(name)
        with suppress(OSError):
            self._shards[file].prefetch(stored)

    @property
    def files(self) -> list[Path]:
        """The weight files, in order."""
        return list(self._shards)

    def bytes_on_disk(self) -> int:
        """Size of the weight files together, in bytes."""
        return sum(file.stat().st_size for file in self._shards)

    def _with_prefix(self, name: str) -> str:
        return name if name.startswith(LM_HEAD + ".") else f"{self.arch.prefix}.{name}"

    def _find(self, name: str) -> tuple[Path, str]:
        if name not in self._where:
            raise InputError(f"{self.path} lacks the tensor {name}",
                             "A shard is missing, or config.json belongs to another model: fetch the directory again.")
        return self._where[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold one object.

    Raises:
        InputError: it is not there, not a plain file of sensible size, not UTF-8, not JSON, or not an object.
    """
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > MOST_JSON_BYTES):
            raise InputError(f"{path} is not a plain file of at most {MOST_JSON_BYTES >> 20} MiB", DAMAGED)
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing", "Give a complete Hugging Face model directory.") from error
    except OSError as error:
        raise from_os_error(error) or InputError(f"{path} cannot be read: {error.strerror}", DAMAGED) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}", DAMAGED) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object", DAMAGED)
    return value


def weight_files(path: Path) -> list[Path]:
    """The weight files of a model directory: by index, else the one usual name, else the only one of its kind.

    Raises:
        InputError: none found, more than one without an index, or one that the index names is missing.
    """
    for kind in ("model.safetensors", "pytorch_model.bin"):
        if (path / f"{kind}.index.json").is_file():
            return _indexed_files(path / f"{kind}.index.json")
        if (path / kind).is_file():
            return [path / kind]
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if len(found) != 1:
        raise (None if found else needs_conversion(path)) or InputError(
            f"{path} holds {len(found)} weight files and no index",
            "Expected model.safetensors, shards with model.safetensors.index.json, or pytorch_model.bin.")
    return found


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index} has no weight_map from tensor to file name", DAMAGED)
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"{index} names a file outside of its folder: {name!r}", "Do not use this directory.")
        if not (index.parent / name).is_file():
            raise InputError(f"shard {index.parent / name} is missing", f"{index.name} names it: fetch it again.")
        files.append(index.parent / name)
    return files


def _open(path: Path) -> TensorFile | PickleFile:
    reject_lfs_pointer(path)
    return TensorFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def read_config(model: str | Path) -> dict[str, Any]:
    """config.json of a directory, such a file itself, or one of `named.CONFIGS` or of the family by its name.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path, found = Path(model), find_belle_model(str(model))
    if not path.exists() and (found or str(model) in CONFIGS):
        return deepcopy(CONFIGS[found.config if found else str(model)])
    if not path.exists():
        raise InputError(f"{model} is neither a model directory nor a known name",
                         f"Give the folder that holds config.json, or one of {', '.join(CONFIGS)}.")
    return read_json(path / "config.json" if path.is_dir() else path)


def needs_conversion(path: Path) -> InputError | None:
    """The error for an encrypted or old checkpoint where a model directory is wanted; None for anything else.

    Args:
        path: a file, or a folder of them.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.enc")) + sorted(path.glob("*.pt"))
    last = {file.suffix: file for file in files if file.is_file()}
    if ".enc" in last:
        return InputError(f"{path} is encrypted",
                          f"First: gptq-belle decrypt {path} OUT --key path/to/consolidated.00.pth")
    if ".pt" in last:
        return InputError(f"{path} is an old checkpoint, which has to be converted first",
                          f"First: gptq-belle convert {path} OUT")
    return None
