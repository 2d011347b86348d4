"""`eval kl` as it is run: the base alone over the text, its predictions to the disk, then each model alone."""

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptq_belle.checkpoint.directory import load_tokenizer
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.evaluation.divergence import check_same_tokenizer
from gptq_belle.evaluation.leak import refuse_overlap
from gptq_belle.evaluation.perplexity import Window, encode, joined, text_documents, windows
from gptq_belle.evaluation.predictions import Predictions, about, kept, record
from gptq_belle.runtime.chat import detect_style
from gptq_belle.runtime.engine import Model

Loader = Callable[[Path], Model]
Counting = Callable[[str], Any]  # a context that gives a function of (done, in all); see `console.counting`


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
