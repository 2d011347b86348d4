"""From tokens to text that may be shown: whole characters, and never a stop string."""

from collections.abc import Callable, Iterable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING_BYTES = 32  # of incomplete characters; SentencePiece's decoder returns whole runs of them at once


class IncrementalDecoder:
    """Tokens in, text out, as soon as it can no longer change: byte-level tokens split Chinese characters.

    Args:
        decode: token ids to text, special tokens left out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # the window that is decoded: some tokens of context (LLaMA drops a first space), and new ones
        self._mark = 0  # where the last whole text ended
        self._shown = ""  # the part of the window's text that was given out

    def feed(self, ids: Iterable[int]) -> str:
        """The text that is now certain and was not before."""
        self._ids += ids
        text = self._decode(self._ids[self._start:])
        whole = text.rstrip(REPLACEMENT)
        if len(text) - len(whole) > MAX_PENDING_BYTES:
            whole = text
        new = whole[len(self._shown):]
        self._shown = whole
        if whole == text and len(self._ids) > self._mark:
            self._start, self._mark = self._mark, len(self._ids)
            self._shown = self._decode(self._ids[self._start:])
        return new

    def finish(self) -> str:
        """What was held back: bytes that never became a character, as replacement characters."""
        text = self._decode(self._ids[self._start:])
        new, self._shown = text[len(self._shown):], text
        return new


class StopStrings:
    """Text in, text out up to the stop string that is complete first; a possible beginning of one is held back.

    Attributes:
        stopped: a stop string was met; nothing comes out any more.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that may be shown now."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        return self._release(len(self._held) - max(map(self._beginning, self._stops), default=0))

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _beginning(self, stop: str) -> int:
        """How many of the last characters are the beginning of `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)


class TextStream:
    """Tokens in, text that may be shown out: `IncrementalDecoder` followed by `StopStrings`."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Iterable[str] = ()) -> None:
        self._whole = IncrementalDecoder(decode)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """True once a stop string was met: generation should end."""
        return self._stops.stopped

    def feed(self, ids: Iterable[int]) -> str:
        """Text that can be shown after these tokens."""
        return self._stops.feed(self._whole.feed(ids))

    def finish(self) -> str:
        """The remaining text after the last token."""
        return self._stops.feed(self._whole.finish()) + self._stops.finish()
