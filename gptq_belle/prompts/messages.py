"""Messages of a conversation, and turns of question and answer, which BELLE's prompt styles express."""

from collections.abc import Iterable, Sequence

from gptq_belle.errors import UsageError
from gptq_belle.prompts.styles import Turn
from gptq_belle.prompts.tool_calls import Message

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
CALLS = ("tool_calls", "function_call")  # keys of a message that are not text


def merge_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages with a role of system, user and assistant and a text; consecutive ones of a role become one.

    ``developer`` is another name for system, and no content is an empty text.

    Raises:
        UsageError: a message has another role, holds a call of a tool, or its content is not text.
    """
    found: list[dict[str, str]] = []
    for message in messages:
        stated, content = message.get("role"), message.get("content")
        role = ROLES.get(str(stated))
        if role is None:
            raise UsageError(f"a message with the role {str(stated)[:40]!r} cannot be expressed in a prompt",
                             f"Roles are {', '.join(ROLES)}.")
        if call := next((key for key in CALLS if message.get(key)), None):
            raise UsageError(f"a message holds {call}, which cannot be expressed in a prompt",
                             "Remove the message.")
        if not isinstance(content, str | None):
            raise UsageError("the content of a message is not text", "Give a string.")
        if found and found[-1]["role"] == role:
            found[-1]["content"] = "\n".join(filter(None, (found[-1]["content"], content)))
        else:
            found.append({"role": role, "content": content or ""})
    return found


def turns_from_messages(messages: Sequence[Message]) -> list[Turn]:
    """Convert messages to turns of question and answer, as BELLE's styles express them.

    Raises:
        UsageError: see `merge_messages`; an answer without a question, or a system message without one.
    """
    turns: list[Turn] = []
    system: list[str] = []
    for message in merge_messages(messages):
        role, content = message["role"], message["content"]
        if role == "system":
            system.append(content)
        elif role == "user":
            turns.append(Turn(content, system="\n".join(system)))
            system = []
        elif turns and turns[-1].answer is None:
            turns[-1] = turns[-1]._replace(answer=content)
        else:
            raise UsageError("an assistant message without a question before it cannot be expressed in BELLE's prompts",
                             "Alternate user and assistant; system messages come before a question.")
    if system:
        raise UsageError("a system message without a question after it cannot be expressed in BELLE's prompts",
                         "Put system messages before a question.")
    return turns


def messages_from_turns(turns: Iterable[Turn]) -> list[dict[str, str]]:
    """Convert turns to messages; a turn without an answer is open."""
    found: list[dict[str, str]] = []
    for turn in turns:
        if turn.system:
            found.append({"role": "system", "content": turn.system})
        found.append({"role": "user", "content": turn.question})
        if turn.answer is not None:
            found.append({"role": "assistant", "content": turn.answer})
    return found
