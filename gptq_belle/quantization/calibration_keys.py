"""What calibration has seen, in a few kilobytes: so that a later evaluation can refuse text that is part of it.

A chat is known by its questions, plain text by its sentences; each is kept as 40 bits of a SHA-256. Two different
texts share a number once in 10^12: a thousand rows held against three thousand are refused wrongly once in 350,000
times. A question that follows others counts together with its answer, and meets only those that do too, for "And on
Tuesday?" says little. Spaces, case, full and half width and a full stop at the end make no difference; a text that was
rewritten is not found.
"""

import base64
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy

from gptq_belle.prompts.styles import Turn

Document = str | Sequence[Turn]
BYTES = 5  # of a key
SHORT_QUESTION = 8  # characters; shorter ones say nothing without their answer
SHORT_SENTENCE = 12  # shorter ones are headings and phrases that any two texts share
SENTENCE = re.compile(r"[。！？!?\n]+|\.\s")
ROLE = re.compile(r"^(human|assistant):")


def document_keys(documents: Iterable[Document]) -> str:
    """The keys of all documents in base64, 7 characters each, sorted."""
    keys = sorted({key for document in documents for row in _rows(document) for key in row})
    return base64.b64encode(b"".join(keys)).decode("ascii")


def overlapping_rows(seen: str, documents: Iterable[Document]) -> tuple[list[int], int]:
    """Hold documents against a fingerprint.

    Args:
        seen: of `document_keys`.
        documents: chats, a row each, and plain texts, of which every sentence is a row.
    Returns:
        The numbers of the rows that were seen, from 1, and how many rows there are.
    Raises:
        ValueError: `seen` is not a fingerprint.
    """
    data = base64.b64decode(seen, validate=True)
    if len(data) % BYTES:
        raise ValueError(f"{len(data)} bytes are not a whole number of keys")
    known = {bytes(key) for key in numpy.frombuffer(data, numpy.uint8).reshape(-1, BYTES)}
    rows = [row for document in documents for row in _rows(document)]
    return [number for number, row in enumerate(rows, 1) if not known.isdisjoint(row)], len(rows)


def _rows(document: Document) -> Iterator[list[bytes]]:
    """The keys of each row of a document."""
    if isinstance(document, str):
        sentences = (_plain(sentence) for sentence in SENTENCE.split(document))
        yield from ([_key(sentence)] for sentence in sentences if len(sentence) >= SHORT_SENTENCE)
    else:
        yield [_key(text) for place, turn in enumerate(document) if (text := _identity(turn, first=place == 0))]


def _identity(turn: Turn, *, first: bool) -> str:
    """What a turn is known by; "" for a short question that another one led to."""
    question, answer = _plain(turn.question), _plain(turn.answer or "")
    if len(question) >= SHORT_QUESTION:
        return question if first else f"{question}\n{answer}"
    return f"{question}\n{answer}" if first else ""


def _plain(text: str) -> str:
    folded = "".join(unicodedata.normalize("NFKC", text).lower().split())
    return ROLE.sub("", folded).rstrip("。.!?")


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:BYTES]
