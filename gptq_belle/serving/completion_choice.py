"""From tokens to what a client may see: whole characters, no stop string, and the probabilities of just those tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gptq_belle.engine.batching import Event
from gptq_belle.prompts.stop_strings import REPLACEMENT, IncrementalDecoder, StopStrings
from gptq_belle.serving.scheduler import QueuedRequest

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's way to write a byte


class TokenLogprob(NamedTuple):
    """A token, and the natural logarithm of its probability."""

    id: int
    logprob: float


class ScoredToken(NamedTuple):
    """A token of an answer: what it was, where its text begins in the answer, and what else was likely."""

    token: TokenLogprob
    offset: int
    top: Sequence[TokenLogprob]


@dataclass(slots=True)
class TextDelta:
    """Text that is certain, and the tokens that it came from where their probabilities are wanted."""

    text: str = ""
    scored: list[ScoredToken] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.scored)


class CompletionChoice:
    """One answer to one prompt.

    Args:
        answer: that was asked for.
        tokenizer: the model's.
        stops: strings that end it and are never shown.

    Attributes:
        index: its number among the choices of a request.
        count: tokens so far.
        reason: "stop" or "length", once it has ended.
    """

    def __init__(self, answer: QueuedRequest, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self.answer, self.tokenizer, self.index = answer, tokenizer, answer.index
        self.count = 0
        self.reason: str | None = None
        self._whole = IncrementalDecoder(lambda ids: decode(tokenizer, ids))
        self._stops = StopStrings(stops)
        self._certain = self._shown = 0  # characters decoded, and characters released by the stop strings
        self._pending: list[ScoredToken] = []

    def feed(self, item: Event | str) -> TextDelta:
        """What may be shown now that a token has come, or the reason why there will be none."""
        if isinstance(item, str):
            rest = self._stops.feed(self._whole.finish())
            piece = self._released(rest + self._stops.finish(), last=True)
            self.reason = "stop" if self._stops.stopped else item
            return piece
        assert item.token is not None  # ends come as reasons
        self.count += 1
        piece = self._feed(item.token, item)
        if self._stops.stopped:
            self.close()
            self.reason = "stop"
        return piece

    def close(self) -> None:
        """Free the slot, unless the answer has ended."""
        if self.reason is None:
            self.answer.cancel()

    def _feed(self, token: int, event: Event) -> TextDelta:
        if event.logprob is not None:
            likely = [TokenLogprob(*pair) for pair in event.top]
            self._pending.append(ScoredToken(TokenLogprob(token, event.logprob), self._certain, likely))
        text = self._whole.feed([token])
        self._certain += len(text)
        return self._released(self._stops.feed(text), last=False)

    def _released(self, text: str, last: bool) -> TextDelta:
        """Tokens whose text begins within the released text are released with it; none after a stop string."""
        self._shown += len(text)
        everything = last and not self._stops.stopped
        ready = [scored for scored in self._pending if scored.offset < self._shown or everything]
        self._pending = self._pending[len(ready):]
        return TextDelta(text, ready)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Where the text of each token begins, in characters; parts of one character begin where it does."""
    whole, places, certain = IncrementalDecoder(lambda part: decode(tokenizer, part)), [], 0
    for token in ids:
        places.append(certain)
        certain += len(whole.feed([token]))
    return places


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> list[int]:
    """The bytes of a token in UTF-8; a part of a character has the bytes of that part."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    if found := BYTE_TOKEN.fullmatch(name):
        return [int(found[1], 16)]
    text = token_text(tokenizer, token)
    if REPLACEMENT in text and all(character in _byte_of() for character in name):
        return [_byte_of()[character] for character in name]
    return list(text.encode())


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one token, special ones by their name."""
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


@cache
def _byte_of() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, scored: Sequence[ScoredToken]) -> dict[str, Any]:
    """The ``logprobs`` of a chat choice."""
    def shown(likely: TokenLogprob) -> dict[str, Any]:
        return {"token": token_text(tokenizer, likely.id), "logprob": likely.logprob,
                "bytes": token_bytes(tokenizer, likely.id)}

    return {"content": [shown(one.token) | {"top_logprobs": [shown(likely) for likely in one.top]} for one in scored],
            "refusal": None}


def text_logprobs(tokenizer: PreTrainedTokenizerBase, scored: Sequence[ScoredToken | int]) -> dict[str, Any]:
    """The ``logprobs`` of a text completion; a bare token id is the first of a prompt, which has no probability."""
    def name(token: int) -> str:
        text = token_text(tokenizer, token)
        if REPLACEMENT not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(tokenizer, token))

    def top(one: ScoredToken) -> dict[str, float]:
        return {name(likely.id): likely.logprob for likely in reversed(one.top)}

    ids = [one if isinstance(one, int) else one.token.id for one in scored]
    return {"tokens": [name(token) for token in ids],
            "token_logprobs": [None if isinstance(one, int) else one.token.logprob for one in scored],
            "top_logprobs": [None if isinstance(one, int) else top(one) for one in scored],
            "text_offset": [0 if isinstance(one, int) else one.offset for one in scored]}
