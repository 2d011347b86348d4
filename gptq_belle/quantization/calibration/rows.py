"""Pack calibration documents into rows of tokens: no padding, eos between documents, chats in the model's prompt."""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptq_belle.errors import InputError, UsageError
from gptq_belle.prompts.conversation import ChatFormat
from gptq_belle.quantization.calibration.data_files import BUILTIN, Documents, read_documents, without_repeats
from gptq_belle.quantization.calibration.messages import Document
from gptq_belle.quantization.calibration.overlap import document_keys

TOKEN_IDS = "token ids"
CALIBRATION_DATE = date(2024, 1, 1)  # in templates that print the date: a job must resume on another day
FIRST_PIECE = 1 << 16  # characters of a document that are tokenized first; twice as many where they are too few
CUT_TOKENS = 64  # tokens before the end of a piece that may differ from those of the whole text
FEWEST_DISTINCT, MOST_DISTINCT = 8, 64  # bounds on the number of distinct tokens that are asked for
TOKENS_PER_INPUT = 4  # below 4 K tokens a K x K Hessian says more about the sample than about the model


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration data and its size.

    Attributes:
        source: a file (see `read_documents`), "builtin" for the text that comes with the package, or token ids
            (rows, T) int64, which are used unchanged.
        rows: maximum number of rows; short text gives fewer.
        seq_len: tokens per row; text that is shorter gives one shorter row.
        seed: random seed for the order of documents.
        allow_short: allow fewer than 4 calibration tokens per input feature.

    Raises:
        UsageError: rows or seq_len is not positive.
    """

    source: str | Path | Tensor = BUILTIN
    rows: int = 128
    seq_len: int = 2048
    seed: int = 0
    allow_short: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1 or self.seq_len < 1:
            raise UsageError(f"{self.rows} rows of {self.seq_len} tokens cannot be calibrated on",
                             "Both must be at least 1.")

    def describe(self, tokens: Tensor, documents: Iterable[Document] = ()) -> dict[str, Any]:
        """The report's description of calibration rows: source, sizes, seed, SHA-256 of the ids, keys of the documents.

        Args:
            tokens: the rows (rows, T).
            documents: the documents that they were taken from (see `overlap.document_keys`).
        """
        count, length = tokens.shape
        source = TOKEN_IDS if isinstance(self.source, Tensor) else BUILTIN if self.source == BUILTIN else Path(
            self.source).name
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        return {"source": source, "rows": count, "seq_len": length, "seed": self.seed, "sha256": digest,
                "seen": document_keys(documents)}


class CalibrationRows(NamedTuple):
    """Calibration data of a job."""

    tokens: Tensor  # ids (rows, T) int64 without padding
    documents: list[Document]  # what they were taken from; none for token ids
    notes: list[str]  # remarks on the source for the user


def calibration_rows(calibration: Calibration, tokenizer: Any, style: str,
                     context: int | None = None) -> CalibrationRows:
    """Read, shuffle, tokenize and pack calibration documents; repeated ones count once, except for the built-in rows.

    Args:
        calibration: the source and its size.
        tokenizer: a transformers tokenizer with an eos token.
        style: prompt style of the chat rows, the name of a `gptq_belle.prompts.conversation.ChatFormat`.
        context: maximum number of tokens per row for the model; None without a limit.
    Raises:
        InputError: as `read_documents`.
    """
    rows, seq_len = calibration.rows, min(calibration.seq_len, context or calibration.seq_len)
    if isinstance(calibration.source, Tensor):
        return CalibrationRows(calibration.source[:rows, :seq_len].to("cpu", torch.int64).contiguous(), [], [])
    documents, notes = _distinct_documents(calibration.source)
    random.Random(calibration.seed).shuffle(documents)
    stream: list[int] = []
    used: list[Document] = []
    chat = ChatFormat(tokenizer, style, CALIBRATION_DATE)
    for document in documents:
        text = document + tokenizer.eos_token if isinstance(document, str) else chat.render_turns(document)
        ids, read = first_token_ids(tokenizer, text, rows * seq_len - len(stream))
        stream += ids
        used.append(document[:read] if isinstance(document, str) else document)
        if len(stream) >= rows * seq_len:
            break
    if not stream:
        raise InputError(f"calibration file {calibration.source} holds no text",
                         "Give a file with text, or --calibration builtin.")
    length = min(seq_len, len(stream))
    count = min(rows, len(stream) // length)
    return CalibrationRows(torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length), used, notes)


def _distinct_documents(source: str | Path) -> Documents:
    """The documents of a source; repeated ones are left out, except for the built-in rows, whose order is fixed."""
    found, notes = read_documents(source)
    documents = found if source == BUILTIN else without_repeats(found)
    if repeated := len(found) - len(documents):
        notes = [*notes, f"{Path(source).name}: {repeated} of {len(found)} rows are skipped, because they repeat an "
                         "earlier one"]
    return Documents(documents, notes)


def first_token_ids(tokenizer: Any, text: str, count: int) -> tuple[list[int], int]:
    """Tokenize the beginning of a text, without special tokens.

    A longer and longer beginning is tokenized until there are enough tokens, so that the time does not depend on the
    length of the text. The tokens are those of the whole text.

    Args:
        count: number of tokens that are needed; a short text gives fewer, and a text may give more.
    Returns:
        The token ids, and the number of characters that were tokenized.
    """
    size = max(FIRST_PIECE, 2 * count)
    while size < len(text):
        ids: list[int] = tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count + CUT_TOKENS:
            return ids[:-CUT_TOKENS], size
        size *= 2
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], len(text)


def check_distinct(tokens: Tensor) -> None:
    """Refuse calibration rows (rows, T) of nearly the same tokens, whose Hessian has hardly any directions.

    Raises:
        InputError: fewer distinct tokens than 1 in 64, within 8 to 64.
    """
    found, needed = len(tokens.unique()), max(FEWEST_DISTINCT, min(MOST_DISTINCT, tokens.numel() // 64))
    if found < needed:
        raise InputError(f"the calibration data has {found} distinct tokens among {tokens.numel()}, and needs {needed}",
                         "Give text of the kind that the model will be used for, or --calibration builtin.")


def check_enough(tokens: Tensor, features: int, name: str) -> None:
    """Refuse calibration data that is too short for the widest linear.

    Args:
        tokens: calibration rows (rows, T).
        features: in_features K of the widest linear.
    Raises:
        InputError: fewer than 4 K tokens.
    """
    count = tokens.numel()
    if count < TOKENS_PER_INPUT * features:
        raise InputError(
            f"{count} calibration tokens are too few: {name} has {features} inputs and needs "
            f"{TOKENS_PER_INPUT * features}",
            "Give more text or more --rows, or use --allow-short.")
