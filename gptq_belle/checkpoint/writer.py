"""Write a model directory atomically.

Tensors are written block by block as small safetensors files in ``OUT.partial/parts``. At the end they are merged into
files of at most 5 GB in ``OUT.partial/files``, which is renamed to ``OUT``. If a job fails, ``OUT.partial`` is removed,
unless `CheckpointWriter.keep` is set so that a later job can resume.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from gptq_belle.checkpoint.reader import read_json
from gptq_belle.checkpoint.safetensors_file import TensorFile, header_bytes, write_rows, write_tensors
from gptq_belle.common.files import FileChecksum, fsync, lock_folder
from gptq_belle.errors import UsageError
from gptq_belle.formats.quantize_config import written_by_gptq_belle

SHARD_BYTES = 5_000_000_000


class CheckpointWriter:
    """Context manager that writes a checkpoint directory.

    Args:
        out: the final directory. An existing one is replaced if it is empty or was written by gptq_belle.
        shard_bytes: maximum size of a weight file in bytes.

    Attributes:
        partial: ``OUT.partial``, locked by this process; it may contain parts of an earlier job.
        parts: folder of the parts in `partial`.
        files: folder in `partial` that becomes `out`; empty on entry.
        keep: whether `partial` is kept if the context exits without `publish`.

    Raises:
        UsageError: `out` or `partial` exists and was not written by gptq_belle, or another job has locked `partial`.
    """

    def __init__(self, out: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.out = Path(out).absolute()
        self.shard_bytes = shard_bytes
        check_output_directory(self.out)
        self.partial = partial_directory(self.out)
        self.parts = self.partial / "parts"
        self.files = self.partial / "files"
        self.keep = False
        self._replaced = self.partial / "replaced"

    def __enter__(self) -> Self:
        if self.partial.is_symlink() or (self.partial.exists() and not _is_leftover(self.partial)):
            raise UsageError(f"{self.partial} exists and was not left by a quantization job", "Move it away.")
        self.parts.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.partial)
        if self._replaced.exists() and not self.out.exists():
            self._replaced.rename(self.out)  # a job was killed between the two renames of `publish`
        for folder in (self.files, self._replaced):
            shutil.rmtree(folder, ignore_errors=True)
        self.files.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.files if self.keep else self.partial, ignore_errors=True)
        os.close(self._lock)

    def add(self, part: str, tensors: Mapping[str, Tensor]) -> FileChecksum:
        """Write tensors as one part."""
        return write_tensors(self.parts / part, tensors)

    def add_rows(self, part: str, name: str, shape: tuple[int, ...], rows: Iterable[Tensor],
                 dtype: torch.dtype = torch.float16) -> FileChecksum:
        """Write one tensor as a part from chunks of its rows."""
        return write_rows(self.parts / part, name, shape, rows, dtype)

    def written(self) -> dict[str, TensorFile]:
        """Files of the parts by tensor name; if several parts contain a tensor, the last one."""
        files = [TensorFile(file) for file in sorted(self.parts.iterdir())]
        return {name: file for file in files for name in file.names()}

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file of the directory."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Write a text file of the directory."""
        (self.files / name).write_text(content, encoding="utf-8")

    def merge(self) -> None:
        """Merge the parts into ``model.safetensors``, or into shards with an index."""
        parts = self.written()
        shards = _shards({name: file.nbytes(name) for name, file in parts.items()}, self.shard_bytes)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        for name, tensors in zip(names, shards, strict=True):
            # Dtypes with larger elements first, so that all tensors are aligned.
            tensors.sort(key=lambda tensor: -parts[tensor].dtype(tensor).itemsize)
            with (self.files / name).open("wb") as out:
                out.write(header_bytes({tensor: parts[tensor].entries[tensor] for tensor in tensors}))
                for tensor in tensors:
                    out.writelines(parts[tensor].chunks(tensor))
        if len(shards) > 1:
            where = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
            total = sum(parts[tensor].nbytes(tensor) for tensor in where)
            self.write_json("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})

    def publish(self) -> None:
        """Rename the finished directory to `out`; an existing one is removed only then."""
        for file in self.files.iterdir():
            fsync(file)
        fsync(self.files)
        if self.out.exists():
            self.out.rename(self._replaced)
        self.files.rename(self.out)
        fsync(self.out.parent)
        self.keep = False


def partial_directory(out: Path) -> Path:
    """Directory of the unfinished output `out`."""
    return out.with_name(out.name + ".partial")


def _is_leftover(partial: Path) -> bool:
    return partial.is_dir() and ((partial / "parts").is_dir() or not any(partial.iterdir()))


def check_output_directory(out: Path) -> None:
    """Raise UsageError for an output directory with files that gptq_belle did not write.

    Raises:
        UsageError: it exists, is not empty, and has no quantize_config.json written by gptq_belle.
    """
    if not out.exists() and not out.is_symlink():
        return
    ours = out / "quantize_config.json"
    replaceable = out.is_dir() and not out.is_symlink()
    if replaceable and (not any(out.iterdir()) or (ours.is_file() and written_by_gptq_belle(read_json(ours)))):
        return
    raise UsageError(f"{out} exists and was not written by gptq_belle", "Choose another output, or move it away.")


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split tensor names, in order, into shards of at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
