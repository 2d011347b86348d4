"""Messages and tools in request bodies."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from gptq_belle.prompts.messages import ROLES
from gptq_belle.serving.field_types import FAIL_FAST, Body, Schema, Text, check_count

MAX_MESSAGES = 4096  # and parts of their contents
MAX_TOOLS = 128
ALL_ROLES = (*ROLES, "tool")
ToolName = Annotated[str, Field(pattern=r"^[\w.:/-]{1,64}$")]


def _known_role(role: str) -> str:
    if role not in ALL_ROLES:
        raise PydanticCustomError("role", "a prompt cannot express this role; the roles are {roles}",
                                  {"roles": ", ".join(map(repr, ALL_ROLES))})
    return role


class CalledFunction(Body):
    """Name and arguments of a call."""

    name: Text
    arguments: Text


class Call(Body):
    """A call of a tool in an earlier answer."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Body):
    """Text part of a message; images and audio are not supported."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message of a conversation; see `prompts.messages.merge_messages` and `prompts.tool_calls`."""

    role: Annotated[Text, AfterValidator(_known_role), Field(json_schema_extra={"enum": [*ALL_ROLES]})]
    content: Text | Annotated[list[TextPart], FAIL_FAST] | None = None
    tool_calls: Annotated[list[Call], FAIL_FAST, Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Text | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """Role, content as one string, calls of tools, and the fields that this schema does not know."""
        text = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content
        return {**(self.model_extra or {}), "role": self.role, "content": text, "tool_call_id": self.tool_call_id,
                "tool_calls": [call.model_dump() for call in self.tool_calls or ()]}


def _few_parts(messages: Any) -> Any:
    """Limit the number of messages and of their parts together, before they are validated."""
    if isinstance(messages, list):
        parts = sum(len(content) for message in messages
                    if isinstance(message, dict) and isinstance(content := message.get("content"), list))
        check_count(len(messages) + parts, MAX_MESSAGES)
    return messages


Messages = Annotated[list[Message], FAIL_FAST, BeforeValidator(_few_parts),
                     Field(min_length=1, max_length=MAX_MESSAGES)]


class Function(Body):
    """A function that an answer can call. Its arguments always follow `parameters`, with and without `strict`."""

    name: ToolName
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """The name of a function."""

    name: ToolName


class NamedTool(Body):
    """The tool that the answer must call."""

    type: Literal["function"]
    function: FunctionName


class TemplateOptions(Body):
    """How a conversation ends, as in vLLM, and the tools that its prompt describes.

    Attributes:
        continue_final_message: the last message is the beginning of the answer.
        add_generation_prompt: whether the prompt ends where the answer begins; the opposite of the other.
        tools: the functions that the answer can call.
        tool_choice: "auto" (text or a call, the default), "none", "required", or the tool to call.
    """

    continue_final_message: bool | None = False
    add_generation_prompt: bool | None = None
    tools: Annotated[list[Tool], FAIL_FAST, Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools of which the prompt tells, as `prompts.tool_calls` takes them: none with tool_choice "none"."""
        given = () if self.tool_choice == "none" else self.tools or ()
        return [{"type": "function", "function": tool.function.model_dump(
            include={"name", "description", "parameters"}, exclude_none=True)} for tool in given]

    @property
    def is_call_required(self) -> bool:
        """Whether the answer must call a tool."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the answer can call: one if it is named."""
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return [tool for tool in self.offered_tools if wanted in (None, tool["function"]["name"])]


