"""A conversation with a model. Answers end where the model would start the next question."""

from collections.abc import Generator
from pathlib import Path

from gptq_belle.checkpoint.reader import read_json
from gptq_belle.common.files import write_json_atomically
from gptq_belle.engine.model import Model
from gptq_belle.engine.sampling_params import DEFAULT_MAX_NEW_TOKENS, SamplingParams
from gptq_belle.errors import InputError, UsageError
from gptq_belle.prompts.messages import messages_from_turns, turns_from_messages
from gptq_belle.prompts.stop_strings import TextStream
from gptq_belle.prompts.styles import Turn

ANSWER_ROOM = 128  # tokens reserved for an answer: older turns are dropped until they are free


class Conversation:
    """Turns with a model; the oldest are dropped when the context is full.

    Args:
        style: "auto" or a key of `prompts.styles.STYLES`.
    Attributes:
        system: system prompt; empty for none.
        tokens: number of tokens of the last answer, including those of a stop string.
    Raises:
        UsageError: an unknown style.
    """

    def __init__(self, model: Model, style: str, params: SamplingParams) -> None:
        self.model, self.params = model, params
        self.format = model.chat_format(style)
        self.turns: list[Turn] = []
        self.system = ""
        self.tokens = 0

    def ask(self, question: str) -> Generator[str, None, None]:
        """Yield the answer in pieces. If closed early, the turn keeps the text so far; a turn without text is dropped.

        Raises:
            UsageError: the question leaves no room for an answer in the context.
        """
        ids, room = self._prompt(question)
        tokenizer = self.model.tokenizer
        text = TextStream(lambda new: str(tokenizer.decode(
            new, skip_special_tokens=True, clean_up_tokenization_spaces=False)), self.format.stops,
            self.params.min_tokens)
        answer, self.tokens = "", 0
        try:
            for token in self.model.tokens(ids, room, self.params):
                self.tokens += 1
                if piece := text.feed([token]):
                    answer += piece
                    yield piece
                if text.stopped:
                    break
            if piece := text.finish():
                answer += piece
                yield piece
        finally:
            if answer:
                self.turns.append(Turn(question, answer))

    def set_system(self, text: str) -> None:
        """Set the system prompt; an empty text removes it.

        Raises:
            UsageError: the model's prompt format has no system prompt.
        """
        messages = [{"role": "system", "content": text}, {"role": "user", "content": "?"}]
        if text and text not in self.format.render(messages):
            raise UsageError(f"the prompt format {self.format.name} has no system prompt",
                             "Write the instruction into the question.")
        self.system = text

    def save(self, path: Path) -> None:
        """Write the turns as ``{"messages": [...]}`` in OpenAI's format; a file of another content is not replaced.

        Raises:
            UsageError: such a file exists.
        """
        if path.exists():
            try:
                read_json(path)["messages"]
            except (InputError, KeyError):
                raise UsageError(f"{path} exists and is no conversation", "Choose another name.") from None
        write_json_atomically(path, {"messages": self._messages(self.turns)})

    def load(self, path: Path) -> None:
        """Replace the turns by those of a file that `save` wrote.

        Raises:
            InputError: the file does not exist, or holds no conversation.
        """
        try:
            turns = turns_from_messages(read_json(path)["messages"])
        except (KeyError, AttributeError, TypeError, UsageError) as error:
            raise InputError(f"{path} is not a conversation: {error}", "Give a file that /save wrote.") from error
        turns = [turn for turn in turns if turn.answer is not None]
        self.set_system(turns[0].system if turns else "")
        self.turns = [turn._replace(system="") for turn in turns]

    def _messages(self, turns: list[Turn]) -> list[dict[str, str]]:
        return messages_from_turns([turn._replace(system="" if place else self.system)
                                    for place, turn in enumerate(turns)])

    def _prompt(self, question: str) -> tuple[list[int], int]:
        """Token ids of the turns and the question, and the answer's token limit; old turns are dropped to make room."""
        context = self.model.context
        limit = self.params.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        enough = min(limit, ANSWER_ROOM)
        while True:
            ids = self.format.prompt(self._messages([*self.turns, Turn(question)])).ids
            room = limit if context is None else min(limit, context - len(ids))
            if room >= enough or not self.turns:
                break
            del self.turns[0]
        if room < 1:
            raise UsageError(f"a question of {len(ids)} tokens does not fit into this model's {context}",
                             "Ask a shorter one.")
        return ids, room
