"""Calls of tools in an answer, as its text arrives."""

import uuid
from dataclasses import dataclass
from typing import Any

from gptq_belle.prompts.stop_strings import StopStrings
from gptq_belle.prompts.tool_calls import CallForm


@dataclass(slots=True)
class CallDelta:
    """New parts of a call; the first one has `id` and `name`."""

    id: str = ""
    name: str = ""
    arguments: str = ""

    def add(self, other: "CallDelta") -> None:
        """Append the parts of a later one."""
        self.id, self.name, self.arguments = (self.id + other.id, self.name + other.name,
                                              self.arguments + other.arguments)

    @property
    def body(self) -> dict[str, Any]:
        """The call in OpenAI's API; of a part without `id` only the arguments."""
        first = {"id": self.id, "type": "function"} if self.id else {}
        named = {"name": self.name} if self.id else {}
        return {**first, "function": {**named, "arguments": self.arguments}}


class CallStream:
    """Separates a call from the text before it. A grammar made sure that nothing follows a call.

    Attributes:
        is_open: whether the text of a call has started.
        is_complete: whether a call has ended.
    """

    def __init__(self, form: CallForm) -> None:
        self._form = form
        self._text, self._name = StopStrings([form.before]), StopStrings([form.between])
        self._read, self._held = "", ""  # name so far; arguments that can be the end of the call
        self.is_complete = False

    @property
    def is_open(self) -> bool:
        return self._text.stopped

    def feed(self, text: str) -> tuple[str, CallDelta | None]:
        """Add text; returns what is not part of a call, and new parts of the call."""
        if not self.is_open:
            shown = self._text.feed(text)
            return shown, self._feed_call(self._text.rest) if self.is_open else None
        return "", self._feed_call(text)

    def finish(self, text: str) -> tuple[str, CallDelta | None]:
        """Add the last text of the answer, which can end in the middle of a call."""
        shown, call = self.feed(text)
        if not self.is_open:
            return shown + self._text.finish(), None
        self.is_complete = self._name.stopped and self._held.endswith(self._form.after)
        call = call or CallDelta()
        call.arguments += self._held.removesuffix(self._form.after)
        return shown, call if call.id or call.arguments else None

    def _feed_call(self, text: str) -> CallDelta | None:
        found = CallDelta()
        if not self._name.stopped:
            self._read += self._name.feed(text)
            if not self._name.stopped:
                return None
            found, text = CallDelta(f"call_{uuid.uuid4().hex[:24]}", self._read), self._name.rest
        self._held += text
        ready = max(len(self._held) - len(self._form.after), 0)
        found.arguments, self._held = self._held[:ready], self._held[ready:]
        return found if found.id or found.arguments else None
