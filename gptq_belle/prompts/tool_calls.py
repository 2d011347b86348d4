"""Tools in prompts: how a model learns of them, how it calls one, and how it gets the result.

A chat template that writes calls as JSON is used for all three. For other models, plain text in the messages describes
them: BELLE was not trained on calls, and a grammar makes sure that its answer is one.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from gptq_belle.errors import UsageError

Message = Mapping[str, Any]
Tool = Mapping[str, Any]  # as in OpenAI's API: {"type": "function", "function": {"name", "description", "parameters"}}
QUESTION, ANSWER, NAME, ARGUMENTS = "question-0", "answer-1", "name-2", {"key-3": "value-4"}
RENDERED_ARGUMENTS = re.compile(r'\{\s*"key-3":\s*"value-4"\s*\}')


class CallForm(NamedTuple):
    """How a model writes a call of a tool: `before`, its name, `between`, its arguments as JSON, `after`."""

    before: str
    between: str
    after: str

    @property
    def trigger(self) -> str:
        """The beginning of every call, which no other text of an answer contains."""
        return self.before.partition("{")[0].strip() or self.before

    def write(self, name: str, arguments: str) -> str:
        """The text of a call."""
        return self.before + name + self.between + arguments + self.after


class ToolForm(NamedTuple):
    """How plain text describes tools (one line of JSON each, for %s), and a result (name and content)."""

    call: CallForm
    tools: str
    result: str


CALL = CallForm('<tool_call>{"name": "', '", "arguments": ', "}</tool_call>")
PLAIN_FORM = ToolForm(CALL, "可以使用以下工具：\n%s\n需要使用工具时，只输出：\n" + CALL.write("工具名", "{参数}"),
                      "工具 %s 的结果：\n%s")


def uses_tools(message: Message) -> bool:
    """Whether a message calls a tool or is the result of one."""
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


def plain_messages(messages: Sequence[Message], tools: Sequence[Tool], form: ToolForm) -> list[Message]:
    """Messages in which calls, results and the tools are text; the first question describes the tools.

    Raises:
        UsageError: a call without name and arguments, or a result that answers no call before it.
    """
    found: list[Message] = []
    names: dict[str, str] = {}  # of the tools that were called, by the id of the call
    described = not tools
    for message in messages:
        content = message.get("content") or ""
        if message.get("role") == "tool":
            name = _called(names, message)
            found.append({"role": "user", "content": form.result % (name, content)})
        elif calls := [_call(call, names) for call in message.get("tool_calls") or ()]:
            found.append({"role": message.get("role"), "content": content + "".join(
                form.call.write(*call) for call in calls)})
        elif message.get("role") == "user" and not described:
            lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
            found.append({"role": "user", "content": form.tools % lines + "\n" + content})
            described = True
        else:
            found.append(message)
    return found


def template_messages(messages: Sequence[Message], merge: Callable[[list[Message]], list[Any]]) -> list[dict[str, Any]]:
    """Messages for a chat template that writes calls: their arguments are objects.

    Args:
        merge: applied to the messages between calls and results.
    Raises:
        UsageError: see `plain_messages`; or arguments that are not a JSON object.
    """
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for is_tool, group in groupby(messages, uses_tools):
        if not is_tool:
            found += merge(list(group))
            continue
        for message in group:
            if message.get("role") == "tool":
                given = {"name": _called(names, message), "tool_call_id": message.get("tool_call_id")}
            else:
                calls = [(call, *_call(call, names)) for call in message["tool_calls"]]
                given = {"tool_calls": [{"type": "function", "id": call.get("id"), "function": {
                    "name": name, "arguments": _object(arguments)}} for call, name, arguments in calls]}
            found.append({"role": message.get("role"), "content": message.get("content") or "", **given})
    return found


def template_call_form(render: Callable[..., str], special_tokens: Sequence[str]) -> CallForm | None:
    """How a chat template writes calls.

    Args:
        render: renders messages, with the options of transformers' `apply_chat_template`.
        special_tokens: tokens that cannot be in a call, since answers are decoded without them.
    Returns:
        The form; None if the template does not write calls as a name followed by JSON.
    Raises:
        UsageError: from `render`.
    """
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object",
                                                                                             "properties": {}}}}]
    question = {"role": "user", "content": QUESTION}
    call = {"type": "function", "id": "012345678", "function": {"name": NAME, "arguments": ARGUMENTS}}
    opened = render([question], tools=tools, add_generation_prompt=True)
    called = render([question, {"role": "assistant", "content": "", "tool_calls": [call]}], tools=tools)
    end = render([question, {"role": "assistant", "content": ANSWER}], tools=tools).partition(ANSWER)[2]
    written = called.removeprefix(opened).removesuffix(end)
    before, _, rest = written.partition(NAME)
    arguments = RENDERED_ARGUMENTS.search(rest)
    if not called.startswith(opened) or arguments is None:
        return None
    form = CallForm(before, rest[:arguments.start()], rest[arguments.end():])
    return None if not before or any(token in part for token in special_tokens for part in form) else form


def _call(call: Any, names: dict[str, str]) -> tuple[str, str]:
    """Name and arguments of a call; the name is added to `names`."""
    function = call.get("function") if isinstance(call, Mapping) else None
    name, arguments = (function.get(key) for key in ("name", "arguments")) if isinstance(function, Mapping) else (0, 0)
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise UsageError("a message holds a call without a name and arguments of a function",
                         'Give {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}.')
    names[str(call.get("id"))] = name
    return name, arguments


def _called(names: Mapping[str, str], message: Message) -> str:
    identifier = str(message.get("tool_call_id"))
    if identifier not in names:
        raise UsageError(f"a message with the role 'tool' answers the call {identifier[:40]!r}, which is not before it",
                         "Put the assistant's message with this call into the conversation.")
    return names[identifier]


def _object(arguments: str) -> dict[str, Any]:
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"the arguments of a call are not a JSON object: {arguments[:80]!r}",
                         "Remove the call from the conversation, or correct it.")
    return found
