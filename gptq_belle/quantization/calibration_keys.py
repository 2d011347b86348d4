"""Keys of the calibration documents, in a few kilobytes, by which an evaluation detects text that was calibrated on.

A chat is identified by its questions and plain text by its sentences, each by 40 bits of a SHA-256. Two different texts
share a key with probability 10^-12; comparing a thousand rows with three thousand gives a false match in one of 350,000
cases. A follow-up question such as "And on Tuesday?" is identified together with its answer. Spaces, case, full and
half width and a final full stop make no difference; a rewritten text is not detected.
"""

import base64
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

import numpy

from gptq_belle.prompts.styles import Turn
from gptq_belle.quantization.calibration_messages import Document

KEY_BYTES = 5
SHORT_QUESTION = 8  # characters; a shorter question is identified together with its answer
SHORT_SENTENCE = 12  # characters; shorter ones are headings and phrases that many texts share
SENTENCE = re.compile(r"[。！？!?\n]+|\.\s")
ROLE = re.compile(r"^(human|assistant):")


def document_keys(documents: Iterable[Document]) -> str:
    """The keys of all documents in base64, 7 characters each, sorted."""
    keys = sorted({key for document in documents for row in _rows(document) for key in row})
    return base64.b64encode(b"".join(keys)).decode("ascii")


def overlapping_rows(seen: str, documents: Iterable[Document]) -> tuple[list[int], int]:
    """Find the rows of documents that are among the keys of other documents.

    Args:
        seen: result of `document_keys`.
        documents: chats, one row each, and plain texts, one row per sentence.
    Returns:
        The numbers of the matching rows, counted from 1, and the total number of rows.
    Raises:
        ValueError: `seen` is malformed.
    """
    data = base64.b64decode(seen, validate=True)
    if len(data) % KEY_BYTES:
        raise ValueError(f"{len(data)} bytes are not a whole number of keys")
    known = {bytes(key) for key in numpy.frombuffer(data, numpy.uint8).reshape(-1, KEY_BYTES)}
    rows = [row for document in documents for row in _rows(document)]
    return [number for number, row in enumerate(rows, 1) if not known.isdisjoint(row)], len(rows)


def _rows(document: Document) -> Iterator[list[bytes]]:
    """The keys of each row of a document."""
    if isinstance(document, str):
        sentences = (_plain(sentence) for sentence in SENTENCE.split(document))
        yield from ([_key(sentence)] for sentence in sentences if len(sentence) >= SHORT_SENTENCE)
    else:
        yield [_key(text) for place, turn in enumerate(document) if (text := _identifying_text(turn, first=place == 0))]


def _identifying_text(turn: Turn, *, first: bool) -> str:
    """The text that identifies a turn; "" for a short follow-up question."""
    question, answer = _plain(turn.question), _plain(turn.answer or "")
    if len(question) >= SHORT_QUESTION:
        return question if first else f"{question}\n{answer}"
    return f"{question}\n{answer}" if first else ""


def _plain(text: str) -> str:
    folded = "".join(unicodedata.normalize("NFKC", text).lower().split())
    return ROLE.sub("", folded).rstrip("。.!?")


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:KEY_BYTES]
