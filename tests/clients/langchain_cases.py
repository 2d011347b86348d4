"""langchain-openai: messages, streams, structured output by its three methods, and tools."""

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from questions import LIMIT, MODEL, QUESTION, Weather, check_answer, check_arguments

TEXT = QUESTION[0]["content"]


@tool
def temperature(city: str) -> str:
    """The temperature of a city."""
    return "20"


def _model(url: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, api_key="none", model=MODEL, max_retries=0, max_tokens=LIMIT)


def case_chat(url: str) -> None:
    assert _model(url).invoke(TEXT).content


def case_stream(url: str) -> None:
    assert "".join(piece.content for piece in _model(url).stream(TEXT))


def case_structured_output_by_json_schema(url: str) -> None:
    check_answer(_model(url).with_structured_output(Weather, method="json_schema").invoke(TEXT))


def case_structured_output_by_a_tool(url: str) -> None:
    check_answer(_model(url).with_structured_output(Weather, method="function_calling").invoke(TEXT))


def case_tools(url: str) -> None:
    (call,) = _model(url).bind_tools([Weather], tool_choice="any", parallel_tool_calls=False).invoke(TEXT).tool_calls
    check_arguments(call["args"])


def case_stream_of_tools(url: str) -> None:
    pieces = list(_model(url).bind_tools([Weather], tool_choice="Weather").stream(TEXT))
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    check_arguments(total.tool_calls[0]["args"])


def case_result_of_a_tool(url: str) -> None:
    bound = _model(url).bind_tools([Weather, temperature])
    called = _model(url).bind_tools([Weather], tool_choice="any").invoke(TEXT)
    result = ToolMessage("20", tool_call_id=called.tool_calls[0]["id"])
    assert bound.invoke([HumanMessage(TEXT), called, result]) is not None
