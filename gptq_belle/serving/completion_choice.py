"""One choice of a response: converts tokens to text, finish reason and log probabilities."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gptq_belle.engine.slots import Event
from gptq_belle.prompts.stop_strings import REPLACEMENT, IncrementalDecoder, StopStrings
from gptq_belle.prompts.tool_calls import CallForm
from gptq_belle.serving.call_stream import CallDelta, CallStream
from gptq_belle.serving.queued_request import QueuedRequest

CACHED_TOKENS = 1 << 16  # texts of tokens: 20 alternatives for each of 2,048 tokens are decoded in 0.5 s otherwise
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's byte tokens


class TokenLogprob(NamedTuple):
    """A token and its log probability (natural logarithm)."""

    id: int
    logprob: float


class ScoredToken(NamedTuple):
    """A token of an answer, the offset of its text in the answer, and the most likely tokens."""

    token: TokenLogprob
    offset: int
    top: Sequence[TokenLogprob]


@dataclass(slots=True)
class TextDelta:
    """New text, new parts of a call, and their tokens if log probabilities are requested."""

    text: str = ""
    scored: list[ScoredToken] = field(default_factory=list)
    call: CallDelta | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.scored or self.call)

    def add(self, other: "TextDelta") -> None:
        """Append a later one."""
        self.text += other.text
        self.scored += other.scored
        if self.call is None:
            self.call = other.call
        elif other.call is not None:
            self.call.add(other.call)


class CompletionChoice:
    """One answer to one prompt.

    Args:
        answer: the queued request.
        stops: stop strings; they are not shown.
        min_tokens: number of tokens at the start whose text is not searched for stop strings.
        calls: form of the calls in it, if tools are offered; they are not searched for stop strings.

    Attributes:
        index: number of the choice in the response.
        count: number of tokens so far.
        reason: "stop", "length" or "tool_calls" when the answer has ended, else None.
    """

    def __init__(self, answer: QueuedRequest, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str],
                 min_tokens: int = 0, calls: CallForm | None = None) -> None:
        self.answer, self.tokenizer, self.index, self._min_tokens = answer, tokenizer, answer.index, min_tokens
        self.count = 0
        self.reason: str | None = None
        self._decoder = IncrementalDecoder(lambda ids: decode(tokenizer, ids))
        self._stops = StopStrings(stops)
        self._calls = None if calls is None else CallStream(calls)
        self._decoded = self._shown = 0  # number of decoded characters, and of those not held back for stop strings
        self._pending: list[ScoredToken] = []

    def feed(self, item: Event | str) -> TextDelta:
        """Process a token or the finish reason, and return the text that can be shown."""
        if isinstance(item, str):
            piece = self._advance(self._decoder.finish(), last=True)
            called = self._calls is not None and self._calls.is_complete and item == "stop"
            self.reason = "stop" if self._stops.stopped else "tool_calls" if called else item
            return piece
        assert item.token is not None  # the end of an answer arrives as a string
        self.count += 1
        if item.logprob is not None:
            likely = [TokenLogprob(*pair) for pair in item.top]
            self._pending.append(ScoredToken(TokenLogprob(item.token, item.logprob), self._decoded, likely))
        piece = self._advance(self._decoder.feed([item.token]), last=False)
        if self._stops.stopped:
            self.close()
            self.reason = "stop"
        return piece

    def close(self) -> None:
        """Free the slot if the answer has not ended."""
        if self.reason is None:
            self.answer.cancel()

    def _advance(self, text: str, last: bool) -> TextDelta:
        """Add decoded text; returns what can be shown, with the tokens whose text starts in it.

        Tokens of a stop string are never returned.
        """
        self._decoded += len(text)
        call, in_call = None, False
        if self._calls is not None:
            text, call = self._calls.finish(text) if last else self._calls.feed(text)
            in_call = self._calls.is_open
        shown = self._stops.feed(text, check=last or self.count > self._min_tokens)
        if last or in_call:
            shown += self._stops.finish()
        self._shown = self._decoded if in_call and not self._stops.stopped else self._shown + len(shown)
        all_tokens = last and not self._stops.stopped
        ready = [scored for scored in self._pending if scored.offset < self._shown or all_tokens]
        self._pending = self._pending[len(ready):]
        return TextDelta(shown, ready, None if self._stops.stopped else call)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode token ids without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Character offset of each token; tokens that are parts of one character have the offset of the character."""
    decoder, places, position = IncrementalDecoder(lambda part: decode(tokenizer, part)), [], 0
    for token in ids:
        places.append(position)
        position += len(decoder.feed([token]))
    return places


@lru_cache(CACHED_TOKENS)
def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> Sequence[int]:
    """UTF-8 bytes of a token, which may be a part of a character."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    if found := BYTE_TOKEN.fullmatch(name):
        return [int(found[1], 16)]
    text = token_text(tokenizer, token)
    if REPLACEMENT in text and all(character in _byte_of_character() for character in name):
        return [_byte_of_character()[character] for character in name]
    return list(text.encode())


@lru_cache(CACHED_TOKENS)
def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Text of one token; special tokens are shown by name."""
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


@cache
def _byte_of_character() -> dict[str, int]:
    """Byte of each printable character that byte-level BPE uses for it."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, scored: Sequence[ScoredToken]) -> dict[str, Any]:
    """Build the ``logprobs`` of a chat choice."""
    def shown(likely: TokenLogprob) -> dict[str, Any]:
        return {"token": token_text(tokenizer, likely.id), "logprob": likely.logprob,
                "bytes": token_bytes(tokenizer, likely.id)}

    return {"content": [shown(one.token) | {"top_logprobs": [shown(likely) for likely in one.top]} for one in scored],
            "refusal": None}


def text_logprobs(tokenizer: PreTrainedTokenizerBase, scored: Sequence[ScoredToken | int]) -> dict[str, Any]:
    """Build the ``logprobs`` of a text completion; an int is the first token of a prompt, which has no probability."""
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
