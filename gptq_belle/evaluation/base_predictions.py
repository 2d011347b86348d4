"""A base model's predictions over a text, computed once, kept on disk, and compared with any number of models."""

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
from gptq_belle.evaluation.calibration_overlap import refuse_overlap
from gptq_belle.evaluation.perplexity import (
    Logits,
    Window,
    encode,
    finite,
    joined,
    text_documents,
    windows,
)
from gptq_belle.prompts.styles import detect_style

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
    write_json_atomically(folder / ABOUT, content)
    return Predictions(folder, windows)


def _file(folder: Path, tokens: int, vocabulary: int) -> Any:
    (folder / LOGITS).unlink(missing_ok=True)
    needed, free = 4 * tokens * vocabulary, shutil.disk_usage(folder).free
    if needed > free:
        raise HardwareError(f"{folder}: predictions of {tokens} tokens take {needed / 1e9:,.1f} GB, "
                            f"and {free / 1e9:,.1f} GB are free", "Look at fewer tokens with --limit.")
    return open_memmap(folder / LOGITS, mode="w+", dtype=numpy.float32, shape=(tokens, vocabulary))


Loader = Callable[[Path], Model]
Counting = Callable[[str], Any]  # a context that gives a function of (done, in all); see `console.progress_bar`


def text_for(path: Path, text: Path, *, allow_overlap: bool = False) -> tuple[Any, str]:
    """A model's tokenizer, and a text as that model reads it.

    Args:
        path: the model directory.
        text: see `perplexity.read_text`.
        allow_overlap: take text that the model was calibrated on.
    Raises:
        InputError: model or text cannot be read, or they overlap (see `leak.refuse_overlap`).
    """
    documents = text_documents(text)
    if not allow_overlap:
        refuse_overlap([path], text, documents)
    tokenizer = load_tokenizer(path)
    style = detect_style(CheckpointReader(path).config, getattr(tokenizer, "chat_template", None))
    return tokenizer, joined(documents, style, tokenizer.eos_token)


def cut(base: Path, tokenizer: Any, words: str, length: int, stride: int | None,
        limit: int | None) -> list[Window]:
    """The windows of a text for a model and its base; raises InputError where their tokenizers differ."""
    check_same_tokenizer(load_tokenizer(base), tokenizer, words)
    return list(windows(encode(tokenizer, words, limit), length, stride))


@contextmanager
def base_predictions(base: Path, text: Sequence[Window], load: Loader, counting: Counting, *,
                     keep: Path | None = None, **settings: Any) -> Iterator[Predictions]:
    """Predictions of a base that is in memory only where they are not on the disk yet.

    Args:
        base: the full-precision model's directory.
        text: its windows.
        load: how it is loaded.
        counting: how progress is shown.
        keep: a folder to take them from, or to leave them in; left out, a temporary one.
        settings: of the run, such as device and precision; those that are kept must have the same.
    Raises:
        UsageError, InputError, HardwareError: as `predictions.kept` and `predictions.record`.
    """
    content = about(base, text, **settings)
    found = kept(keep, content, text) if keep else None
    if found is not None:
        yield found
        return
    with tempfile.TemporaryDirectory(prefix="gptq-belle-") as scratch:
        model = load(base)
        with counting("windows of the base") as progress:
            found = record(keep or Path(scratch), content, model.logits, text, progress)
        del model
        gc.collect()  # modules refer to each other: without this the base would stay beside the next model
        yield found


def check_same_tokenizer(base: Any, model: Any, text: str) -> None:
    """Make sure that two tokenizers cut a text alike.

    Raises:
        InputError: they do not, so that predictions cannot be compared position by position.
    """
    sample = text[:20_000]
    if not torch.equal(encode(base, sample), encode(model, sample)):
        raise InputError("the two models cut the text into different tokens",
                         "Give as --base the model that was quantized, with its own tokenizer.")
