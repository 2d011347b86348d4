"""A base model's predictions over a text, on the disk: computed once, compared with any number of models later.

A folder holds logits.npy, (S, V) float32 for the S scored tokens of all windows in order, and about.json, which says
of what they are and is written last: without it the logits are not whole. Logits are kept as the model gave them,
4 V bytes a token (1.0 MB with BLOOM's 250,880 tokens). llama-perplexity keeps 16 bits of each; its published logs
show KLs down to -1e-4, which no pair of distributions has, while 8-bit weights make a mean of 2e-4.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from gptq_belle.checkpoint.durable import write_json_durably
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import HardwareError, UsageError
from gptq_belle.evaluation.perplexity import Logits, Window, finite

LOGITS, ABOUT = "logits.npy", "about.json"


class Predictions:
    """What a base model predicts for the scored tokens of a text's windows.

    Attributes:
        windows: the text.
    """

    def __init__(self, folder: Path, windows: Sequence[Window]) -> None:
        self.windows = windows
        self._ends = list(accumulate(window.scored for window in windows))
        self._logits = numpy.load(folder / LOGITS, mmap_mode="r")

    def rows(self, number: int) -> Tensor:
        """Logits (scored, V) float32 of one window's scored tokens."""
        end = self._ends[number]
        return torch.from_numpy(self._logits[end - self.windows[number].scored : end].copy())


def about(base: str | Path, windows: Sequence[Window], **settings: Any) -> dict[str, Any]:
    """What predictions follow from: the model, the windows, and how it is run; raises as `identity`."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{window.scored}:".encode() + window.ids.numpy().tobytes())
    return {"model": identity(base), "settings": settings, "windows": digest.hexdigest()}


def identity(path: str | Path) -> dict[str, Any]:
    """A model directory by the names, sizes and times of its files, which changed content does not keep.

    Raises:
        InputError: it is none.
    """
    reader = CheckpointReader(path)
    stats = {file.name: file.stat() for file in [*reader.files, reader.path / "config.json"]}
    return {"path": str(reader.path.resolve()),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def kept(folder: Path, content: dict[str, Any], windows: Sequence[Window]) -> Predictions | None:
    """Predictions that a folder holds, if they are those of `about` and whole; else None.

    Raises:
        UsageError: the folder holds other things; nothing of it would be overwritten.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not {path.name for path in folder.iterdir()} <= {LOGITS, ABOUT, ABOUT + ".unfinished"}:
        raise UsageError(f"{folder} holds other files than predictions", "Name a new folder.")
    try:
        if json.loads((folder / ABOUT).read_text(encoding="utf-8")) == content:
            return Predictions(folder, windows)
    except (OSError, ValueError):
        pass
    return None


def record(folder: Path, content: dict[str, Any], logits: Logits, windows: Sequence[Window],
           progress: Callable[[int, int], None] | None = None) -> Predictions:
    """Run a model over windows and keep what it predicts.

    Args:
        folder: where; earlier predictions in it are replaced.
        content: of `about`.
        logits: the model's function from ids (1, T) to logits (1, T, V).
        progress: called with (windows done, windows in all).
    Raises:
        InputError: logits that are not finite.
        HardwareError: the disk has no room for them; the size is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    total, file = sum(window.scored for window in windows), None
    for number, window in enumerate(windows):
        rows = finite(logits(window.ids[None])[0])[-window.scored - 1 : -1].cpu()
        if file is None:
            file, start = _file(folder, total, rows.shape[1]), 0
        file[start : start + window.scored] = rows.numpy()
        start += window.scored
        if progress:
            progress(number + 1, len(windows))
    assert file is not None
    file.flush()
    write_json_durably(folder / ABOUT, content)
    return Predictions(folder, windows)


def _file(folder: Path, tokens: int, vocabulary: int) -> Any:
    (folder / LOGITS).unlink(missing_ok=True)
    needed, free = 4 * tokens * vocabulary, shutil.disk_usage(folder).free
    if needed > free:
        raise HardwareError(f"{folder}: predictions of {tokens} tokens take {needed / 1e9:,.1f} GB, "
                            f"and {free / 1e9:,.1f} GB are free", "Look at fewer tokens with --limit.")
    return open_memmap(folder / LOGITS, mode="w+", dtype=numpy.float32, shape=(tokens, vocabulary))
