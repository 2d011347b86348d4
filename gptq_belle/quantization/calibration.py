"""Read calibration text and pack it into rows of tokens: no padding, eos between documents, chats in BELLE's prompt.

Accepted files: plain UTF-8 text (one document), JSON Lines, or a JSON array. A JSON row is one of

    {"text": ...}                                    plain text
    {"instruction": ..., "input": ..., "output": ...}   Alpaca; input may be missing or empty
    {"input": ..., "target": ...}                    BELLE's train_*.json
    {"question": ..., "std_answer": ...}             BELLE's evaluation set
    {"conversations": [{"from": "human", "value": ...}, {"from": "assistant", "value": ...}, ...]}
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_belle.errors import InputError, UsageError
from gptq_belle.prompts.styles import Turn, render_conversation
from gptq_belle.quantization.calibration_keys import document_keys

BUILTIN, TOKEN_IDS = "builtin", "token ids"
TOKENS_PER_INPUT = 4  # below 4 K tokens a K x K Hessian says more about the sample than about the model


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration data and its size.

    Attributes:
        source: a file (see above), "builtin" for the text that comes with the package, or token ids (rows, T) int64,
            which are used unchanged.
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

    def describe(self, tokens: Tensor, documents: Iterable[str | list[Turn]] = ()) -> dict[str, Any]:
        """The report's description of calibration rows: source, sizes, seed, SHA-256 of the ids, keys of the documents.

        Args:
            tokens: the rows (rows, T).
            documents: the documents that they were taken from (see `calibration_keys.document_keys`).
        """
        count, length = tokens.shape
        source = TOKEN_IDS if isinstance(self.source, Tensor) else BUILTIN if self.source == BUILTIN else Path(
            self.source).name
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        return {"source": source, "rows": count, "seq_len": length, "seed": self.seed, "sha256": digest,
                "seen": document_keys(documents)}


def calibration_tokens(calibration: Calibration, tokenizer: Any, style: str, context: int | None = None) -> Tensor:
    """The rows of `calibration_rows`, without the documents."""
    return calibration_rows(calibration, tokenizer, style, context)[0]


def calibration_rows(calibration: Calibration, tokenizer: Any, style: str,
                     context: int | None = None) -> tuple[Tensor, list[str | list[Turn]]]:
    """Read, shuffle, tokenize and pack calibration documents.

    Args:
        calibration: the source and its size.
        tokenizer: a transformers tokenizer with an eos token.
        style: prompt style of the chat rows, a key of `gptq_belle.prompts.styles.STYLES`.
        context: maximum number of tokens per row for the model; None without a limit.
    Returns:
        Token ids (rows, T) int64 without padding, and the documents that they were taken from.
    Raises:
        InputError: the file is missing, empty, not UTF-8, or has a row of unknown form; the line is named.
    """
    rows, seq_len = calibration.rows, min(calibration.seq_len, context or calibration.seq_len)
    if isinstance(calibration.source, Tensor):
        return calibration.source[:rows, :seq_len].to("cpu", torch.int64).contiguous(), []
    documents = read_documents(calibration.source)
    random.Random(calibration.seed).shuffle(documents)
    stream: list[int] = []
    used = 0
    for document in documents:
        used += 1
        stream += tokenizer(_text(document, style, tokenizer.eos_token), add_special_tokens=False)["input_ids"]
        if len(stream) >= rows * seq_len:
            break
    if not stream:
        raise InputError(f"calibration file {calibration.source} holds no text",
                         "Give a file with text, or --calibration builtin.")
    length = min(seq_len, len(stream))
    count = min(rows, len(stream) // length)
    return torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length), documents[:used]


def check_enough(tokens: Tensor, features: int, name: str) -> None:
    """Refuse calibration data that is too short for the widest linear.

    Args:
        tokens: calibration rows (rows, T).
        features: in_features K of the widest linear.
        name: that linear's name.
    Raises:
        InputError: fewer than 4 K tokens.
    """
    count = tokens.numel()
    if count < TOKENS_PER_INPUT * features:
        raise InputError(
            f"{count} calibration tokens are too few: {name} has {features} inputs and needs "
            f"{TOKENS_PER_INPUT * features}",
            "Give more text or more --rows, or use --allow-short.")


def read_documents(source: str | Path) -> list[str | list[Turn]]:
    """The documents of a calibration file: plain text, or the turns of a chat.

    Raises:
        InputError: as `calibration_tokens`.
    """
    path = Path(str(files("gptq_belle") / "data" / "builtin.jsonl")) if source == BUILTIN else Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})", "Convert it, e.g. with iconv.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "Give a UTF-8 text or JSONL file.") from error
    documents = list(_documents(path, text))
    if not documents:
        raise InputError(f"{path} is empty", "Give a file with text.")
    return documents


def _documents(path: Path, text: str) -> Iterator[str | list[Turn]]:
    if path.suffix not in (".json", ".jsonl"):
        if text.strip():
            yield text
        return
    for where, row in _json_rows(path, text):
        document = _document(row)
        if document is None:
            raise InputError(f"{path}, {where}: a row of unknown form",
                             "A row has text, instruction/output, input/target, question/std_answer or conversations.")
        yield document


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Location and value of every row of a JSON array or of JSON Lines."""
    try:
        if text.lstrip().startswith("["):
            yield from ((f"row {i}", row) for i, row in enumerate(json.loads(text), 1))
            return
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}", "Correct the file, or use JSON Lines.") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not valid JSON: {error}", "Correct or delete it.") from error


def _document(row: Any) -> str | list[Turn] | None:
    """The document in a row; None for a row of unknown form."""
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row.get("conversations"), list):
        return _conversation(row["conversations"])
    question, answer = _pair(row)
    if not isinstance(question, str) or not isinstance(answer, str):
        return None
    return [Turn(_bare(question), answer)]


def _pair(row: dict[str, Any]) -> tuple[Any, Any]:
    if isinstance(row.get("instruction"), str):
        return _joined(row["instruction"], row.get("input")), row.get("output")
    if "target" in row:
        return row.get("input"), row["target"]
    return row.get("question"), row.get("std_answer")


def _bare(question: str) -> str:
    """The question without BELLE's prompt, which its first releases include in `input`; `render` adds it again."""
    return question.strip().removeprefix("Human:").removesuffix("Assistant:").strip()


def _joined(instruction: str, given: Any) -> str:
    return f"{instruction}\n{given}" if isinstance(given, str) and given else instruction


def _conversation(messages: list[Any]) -> list[Turn] | None:
    """Turns of (human, assistant) values, without an unanswered last question; None for a malformed list."""
    values = [m["value"] for m in messages if isinstance(m, dict) and isinstance(m.get("value"), str)]
    if len(values) != len(messages):
        return None
    return [Turn(q, a) for q, a in zip(values[::2], values[1::2], strict=False)] or None


def _text(document: str | list[Turn], style: str, eos: str) -> str:
    return document + eos if isinstance(document, str) else render_conversation(document, style, eos)
