"""Convert streamed tokens to text: only complete characters, cut off before the first stop string."""

from collections.abc import Callable, Iterable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING_BYTES = 32  # of incomplete characters: SentencePiece's decoder returns long runs of them at once


class IncrementalDecoder:
    """Decodes streamed tokens, and returns text when it can no longer change: tokens can split Chinese characters.

    Args:
        decode: function that decodes token ids to text without special tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # first token that is decoded: some context is needed, as LLaMA drops a leading space
        self._complete = 0  # number of tokens whose text is complete
        self._shown = ""  # the part of the decoded text that was returned

    def feed(self, ids: Iterable[int]) -> str:
        """Add tokens and return the text that is now final."""
        self._ids += ids
        text = self._decode(self._ids[self._start:])
        whole = text.rstrip(REPLACEMENT)
        if len(text) - len(whole) > MAX_PENDING_BYTES:
            whole = text
        new = whole[len(self._shown):]
        self._shown = whole
        if whole == text and len(self._ids) > self._complete:
            self._start, self._complete = self._complete, len(self._ids)
            self._shown = self._decode(self._ids[self._start:])
        return new

    def finish(self) -> str:
        """Return the remaining text; incomplete characters become replacement characters."""
        text = self._decode(self._ids[self._start:])
        new, self._shown = text[len(self._shown):], text
        return new


class StopStrings:
    """Cuts off streamed text at the first complete stop string, and holds back text that may be the start of one.

    Attributes:
        stopped: whether a stop string was found; no text is returned after it.
        rest: the text after it that came with it.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = self.rest = ""
        self.stopped = False

    def feed(self, text: str, check: bool = True) -> str:
        """Add text and return the part that can be shown; without `check`, all of it."""
        if self.stopped or not check:
            return "" if self.stopped else text
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, (end, start) = True, min(found)
            self.rest = self._held[end:]
            return self._held[:start]
        return self._release(len(self._held) - max(map(self._overlap, self._stops), default=0))

    def finish(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _overlap(self, stop: str) -> int:
        """Number of characters at the end of the text that are the start of `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)


class TextStream:
    """Converts streamed tokens to text that can be shown: `IncrementalDecoder` followed by `StopStrings`.

    Args:
        decode: see `IncrementalDecoder`.
        stops: see `StopStrings`.
        min_tokens: number of tokens at the start whose text is not searched for stop strings, as in vLLM.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Iterable[str] = (), min_tokens: int = 0) -> None:
        self._decoder = IncrementalDecoder(decode)
        self._stops = StopStrings(stops)
        self._unchecked = min_tokens

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, so that generation should end."""
        return self._stops.stopped

    def feed(self, ids: Iterable[int]) -> str:
        """Add tokens and return the text that can be shown."""
        text = ""
        for token in ids:
            text += self._stops.feed(self._decoder.feed([token]), check=self._unchecked <= 0)
            self._unchecked -= 1
        return text

    def finish(self) -> str:
        """Return the remaining text after the last token."""
        return self._stops.feed(self._decoder.finish()) + self._stops.finish()
