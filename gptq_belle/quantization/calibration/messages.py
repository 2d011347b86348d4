"""Turn rows of a data file into documents: plain text, or the turns of a conversation, paired by role.

A row is a text, a list of messages, or an object with one of

    text                                   plain text
    conversations, conversation, messages  messages {"from": ..., "value": ...} or {"role": ..., "content": ...}
    instruction, input, output             Alpaca and BELLE's train_*.json; input may be missing or empty
    instruction, instances                 BELLE's zh_seed_tasks.json: a list of objects with input and output
    input, target                          BELLE's first train_*.json
    question, std_answer                   BELLE's evaluation set
    another pair of PAIRS

and, besides conversations and pairs, `system` (a text) and `history` (earlier pairs or messages). A question that is
itself a dialogue, "Human: ... Assistant: ... Human: ... Assistant:" in BELLE's multiturn_chat_0.8M.json, becomes turns.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gptq_belle.common.text import is_unicode
from gptq_belle.prompts.messages import turns_from_messages
from gptq_belle.prompts.styles import Turn

Document = str | list[Turn]
Message = dict[str, str]
CONVERSATIONS = ("conversations", "conversation", "messages")
SYSTEM = ("system", "system_prompt")
PAIRS = (("input", "target"), ("question", "std_answer"), ("question", "answer"), ("question", "response"),
         ("query", "response"), ("prompt", "response"), ("prompt", "completion"), ("prompt", "output"))
ROLES = {**dict.fromkeys(("user", "human"), "user"), **dict.fromkeys(("system", "developer"), "system"),
         **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard"), "assistant")}
SPEAKER = re.compile(r"\n\s*(Human|Assistant)\s*[:：]")
CALLS = ("tool_calls", "function_call")
FORMS = "A row has text, messages or conversations, instruction/output, input/target or question/std_answer."


class RowError(ValueError):
    """A row that cannot be used; `args` are cause and remedy."""


class RowContent(NamedTuple):
    """A row's content."""

    document: Document | None  # the document; None for a row without text, or without an answer
    unused: list[str]  # names of fields that hold a value and are not used
    cut: int = 0  # number of messages that are left out because they have no question, or no answer


def row_content(row: Any) -> RowContent:
    """The document in a row.

    Raises:
        RowError: the row has an unknown form, or holds something that is not text in a known role.
    """
    if isinstance(row, str):
        return RowContent(_encodable(row) if row.strip() else None, [])
    if isinstance(row, list):
        return _conversation(_messages(row), [])
    if not isinstance(row, dict):
        raise RowError("a row of unknown form", FORMS)
    if isinstance(row.get("text"), str):
        return RowContent(_encodable(row["text"]) if row["text"].strip() else None, _unused(row, "text"))
    key = next((key for key in CONVERSATIONS if isinstance(row.get(key), list)), None)
    used: tuple[str, ...]
    messages, used = _pair(row) if key is None else (_messages(row[key]), (key,))
    system = [{"role": "system", "content": _text(row[key], key)} for key in SYSTEM if row.get(key)]
    return _conversation([*system, *_history(row.get("history")), *messages], _unused(row, *used, *SYSTEM, "history"))


def _unused(row: Mapping[str, Any], *used: str) -> list[str]:
    return [str(key) for key, value in row.items() if key not in used and value not in (None, "", [], {})]


def _pair(row: Mapping[str, Any]) -> tuple[list[Message], tuple[str, ...]]:
    """The messages of a question and its answer in two or three fields, and the fields' names."""
    used: tuple[str, ...] | None
    if isinstance(row.get("instances"), list) and isinstance(row.get("instruction"), str):
        examples = [example if isinstance(example, dict) else {} for example in row["instances"]]
        found = [_pair({"instruction": row["instruction"], "output": None} | example)[0] for example in examples]
        return [message for messages in found for message in messages], ("instruction", "instances")
    pairs = (("instruction", "output"), *PAIRS)
    used = next((pair for pair in pairs if row.get(pair[0]) is not None and pair[1] in row), None)
    if used is None:
        raise RowError("a row of unknown form", FORMS)
    question = _text(row[used[0]], used[0])
    if used[0] == "instruction":
        given = _text(row.get("input"), "input")
        question, used = f"{question}\n{given}" if given else question, (*used, "input")
    return [*_dialogue(question), {"role": "assistant", "content": _text(row[used[1]], used[1])}], used


def _dialogue(question: str) -> list[Message]:
    """The messages of a question. Some of BELLE's files write its prompt around it, which rendering adds again."""
    _, *parts = SPEAKER.split(f"\n{question.strip()}")
    if not parts or not question.lstrip().startswith("Human"):
        return [{"role": "user", "content": question.strip()}]
    return [{"role": ROLES[name.lower()], "content": text.strip()}
            for name, text in zip(parts[::2], parts[1::2], strict=True)]


def _history(turns: Any) -> list[Message]:
    """Earlier turns: pairs of question and answer, or messages."""
    if turns in (None, ""):
        return []
    if not isinstance(turns, list):
        raise RowError("history is not a list", "It holds pairs [question, answer], or messages.")
    messages: list[Message] = []
    for turn in turns:
        if isinstance(turn, list) and len(turn) == 2:
            messages += [{"role": role, "content": _text(value, "history")}
                         for role, value in zip(("user", "assistant"), turn, strict=True)]
        else:
            messages += _messages([turn])
    return messages


def _messages(messages: list[Any]) -> list[Message]:
    """Messages of any form with the roles user, assistant and system."""
    found: list[Message] = []
    for message in messages:
        if not isinstance(message, dict):
            raise RowError(f"a message is {_kind(message)}, not an object", "A message has a role and a content.")
        if {"human", "assistant"} <= message.keys():
            found += [{"role": ROLES[role], "content": _text(message[role], role)} for role in ("human", "assistant")]
            continue
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if call := next((key for key in CALLS if message.get(key)), None):
            raise RowError(f"a message holds {call}, which no prompt style expresses", "Remove such conversations.")
        if not isinstance(role, str) or role.strip().lower() not in ROLES:
            raise RowError(f"a message with role {str(role)[:40]!r}, which no prompt style expresses",
                           f"Roles are {', '.join(ROLES)}.")
        if not {"content", "value"} & message.keys():
            raise RowError("a message without content", "A message has a role and a content, or from and value.")
        found.append({"role": ROLES[role.strip().lower()], "content": _text(content, "content")})
    return found


def _conversation(messages: list[Message], unused: list[str]) -> RowContent:
    """Turns of question and answer; messages of the same role that follow one another are one."""
    joined: list[Message] = []
    for message in (message for message in messages if message["content"].strip()):
        before = joined[-1]["role"] if joined else ""
        if before == message["role"] or (before, message["role"]) == ("user", "system"):
            joined[-1] = {"role": before, "content": f"{joined[-1]['content']}\n{message['content']}"}
        else:
            joined.append(message)
    roles = [message["role"] for message in joined]
    first = roles.index("user") if "user" in roles else len(roles)
    last = len(roles) - roles[::-1].index("assistant") if "assistant" in roles else 0
    kept = [message for place, message in enumerate(joined)
            if first <= place < last or (message["role"] == "system" and place < first < last)]
    return RowContent(turns_from_messages(kept) or None, unused, len(joined) - len(kept))


def _text(value: Any, field: str) -> str:
    """The text of a field: a string, null for an empty one, or OpenAI's list of text parts."""
    if isinstance(value, list):
        return "".join(_text_part(part, field) for part in value)
    if not isinstance(value, str | None):
        raise RowError(f"{field} is {_kind(value)}, not a text", "Correct or delete the row.")
    return _encodable(value or "")


def _text_part(part: Any, field: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        raise RowError(f"{field} holds a part that is not text: {_kind(part)}", "Remove such rows.")
    return _encodable(text)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object of type {str(value['type'])[:40]!r}" if "type" in value else "an object"
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _encodable(text: str) -> str:
    if not is_unicode(text):
        raise RowError("a text holds half of a surrogate pair, such as \\ud83d, which is no character",
                       "Write the row again from its source, or delete it.")
    return text
