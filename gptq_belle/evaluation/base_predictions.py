"""Stored predictions of a base model on a text: computed once, and compared with any number of models."""

import gc
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.common.files import write_json_atomically
from gptq_belle.engine.model import Model
from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.evaluation.perplexity import (
    LogitsFunction,
    Progress,
    TextWindow,
    check_finite,
    encode,
    join_documents,
    read_text_documents,
    split_windows,
)
from gptq_belle.prompts.conversation import chat_format
from gptq_belle.quantization.calibration.overlap import refuse_overlap

LOGITS, KEY = "logits.npy", "about.json"
ModelLoader = Callable[[Path], Model]
ProgressBar = Callable[[str], Any]  # from a title to a context that yields a callback of (done, total)


class BasePredictions:
    """Stored logits of a base model for the scored tokens of a text."""

    def __init__(self, folder: Path, windows: Sequence[TextWindow]) -> None:
        self.windows = windows
        self._ends = list(accumulate(window.scored for window in windows))
        self._logits = numpy.load(folder / LOGITS, mmap_mode="r")

    def rows(self, number: int) -> Tensor:
        """Logits (scored, V) float32 of the scored tokens of one window."""
        end = self._ends[number]
        return torch.from_numpy(self._logits[end - self.windows[number].scored : end].copy())


@contextmanager
def open_predictions(base: Path, windows: Sequence[TextWindow], load: ModelLoader, progress_bar: ProgressBar, *,
                     keep: Path | None = None, **settings: Any) -> Iterator[BasePredictions]:
    """Yield the predictions of a base, which is loaded only if they are not stored yet.

    Args:
        keep: folder to read the predictions from, or to store them in. Default: a temporary folder.
        settings: settings of the run, such as device and precision; stored predictions are used only if theirs are
            the same.
    Raises:
        UsageError, InputError, HardwareError: as `load_predictions` and `record_predictions`.
    """
    key = prediction_key(base, windows, **settings)
    found = load_predictions(keep, key, windows) if keep else None
    if found is not None:
        yield found
        return
    with tempfile.TemporaryDirectory(prefix="gptq-belle-") as scratch:
        model = load(base)
        with progress_bar("windows of the base") as progress:
            found = record_predictions(keep or Path(scratch), key, model.logits, windows, progress)
        del model
        gc.collect()  # modules refer to each other: otherwise the base stays in memory beside the next model
        yield found


def prediction_key(base: str | Path, windows: Sequence[TextWindow], **settings: Any) -> dict[str, Any]:
    """Everything that predictions depend on: model, windows and settings; raises as `checkpoint_identity`."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{window.scored}:".encode() + window.ids.numpy().tobytes())
    return {"model": checkpoint_identity(base), "settings": settings, "windows": digest.hexdigest()}


def checkpoint_identity(path: str | Path) -> dict[str, Any]:
    """Names, sizes and modification times of a model directory's files, to notice that the model was changed.

    Raises:
        InputError: the path is not a model directory.
    """
    reader = CheckpointReader(path)
    stats = {file.name: file.stat() for file in [*reader.files, reader.path / "config.json"]}
    return {"path": str(reader.path.resolve()),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def load_predictions(folder: Path, key: dict[str, Any], windows: Sequence[TextWindow]) -> BasePredictions | None:
    """The predictions in a folder if they are complete and have this `prediction_key`, else None.

    Raises:
        UsageError: the folder contains other files; none of them is overwritten.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not {path.name for path in folder.iterdir()} <= {LOGITS, KEY, KEY + ".unfinished"}:
        raise UsageError(f"{folder} holds other files than predictions", "Name a new folder.")
    try:
        if json.loads((folder / KEY).read_text(encoding="utf-8")) == key:
            return BasePredictions(folder, windows)
    except (OSError, ValueError):
        pass
    return None


def record_predictions(folder: Path, key: dict[str, Any], logits: LogitsFunction, windows: Sequence[TextWindow],
                       progress: Progress = lambda done, total: None) -> BasePredictions:
    """Run a model on all windows and store its logits.

    Args:
        folder: output folder; earlier predictions in it are replaced.
        logits: the model's function from ids (1, T) to logits (1, T, V).
        progress: called with (windows done, number of windows).
    Raises:
        InputError: logits that are not finite.
        HardwareError: not enough disk space; the message names the size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEY).unlink(missing_ok=True)
    total, file = sum(window.scored for window in windows), None
    for number, window in enumerate(windows):
        rows = check_finite(logits(window.ids[None])[0])[-window.scored - 1 : -1].cpu()
        if file is None:
            file, start = _create_logits_file(folder, total, rows.shape[1]), 0
        file[start : start + window.scored] = rows.numpy()
        start += window.scored
        progress(number + 1, len(windows))
    assert file is not None
    file.flush()
    write_json_atomically(folder / KEY, key)
    return BasePredictions(folder, windows)


def _create_logits_file(folder: Path, tokens: int, vocabulary: int) -> Any:
    (folder / LOGITS).unlink(missing_ok=True)
    needed, free = 4 * tokens * vocabulary, shutil.disk_usage(folder).free
    if needed > free:
        raise HardwareError(f"{folder}: predictions of {tokens} tokens take {needed / 1e9:,.1f} GB, "
                            f"and {free / 1e9:,.1f} GB are free", "Use fewer tokens with --limit.")
    return open_memmap(folder / LOGITS, mode="w+", dtype=numpy.float32, shape=(tokens, vocabulary))


def read_text_for(path: Path, text: Path, *, allow_overlap: bool = False) -> tuple[Any, str]:
    """The tokenizer of a model, and a text with chats in the model's prompt style.

    Args:
        text: see `perplexity.read_text`.
        allow_overlap: accept text that the model was calibrated on.
    Raises:
        InputError: model or text cannot be read, or they overlap (see `refuse_overlap`).
    """
    documents = read_text_documents(text)
    if not allow_overlap:
        refuse_overlap([path], text, documents)
    tokenizer = load_tokenizer(path)
    return tokenizer, join_documents(documents, chat_format(CheckpointReader(path).config, tokenizer))


def windows_for(base: Path, tokenizer: Any, text: str, length: int, stride: int | None,
                limit: int | None) -> list[TextWindow]:
    """The windows of a text for a model and its base; raises InputError if their tokenizers differ."""
    check_same_tokenizer(load_tokenizer(base), tokenizer, text)
    return list(split_windows(encode(tokenizer, text, limit), length, stride))


def check_same_tokenizer(base: Any, model: Any, text: str) -> None:
    """Check that two tokenizers encode a text alike, so that predictions can be compared position by position.

    Raises:
        InputError: they do not.
    """
    sample = text[:20_000]
    if not torch.equal(encode(base, sample), encode(model, sample)):
        raise InputError("the two models split the text into different tokens",
                         "Give as --base the model that was quantized, with its own tokenizer.")
