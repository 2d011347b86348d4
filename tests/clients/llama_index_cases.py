"""llama-index with OpenAILike: chat, streams, structured answers and tools."""

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from questions import LIMIT, MODEL, QUESTION, Weather, check_answer

MESSAGES = [ChatMessage(**QUESTION[0])]


def _model(url: str, **options) -> OpenAILike:
    return OpenAILike(model=MODEL, api_base=url, api_key="none", is_chat_model=True, context_window=512,
                      max_tokens=LIMIT, max_retries=0, is_function_calling_model=True, **options)


def temperature(degrees: int) -> str:
    """Set the temperature."""
    return str(degrees)


def case_chat(url: str) -> None:
    assert _model(url).chat(MESSAGES).message.content


def case_completion(url: str) -> None:
    assert OpenAILike(model=MODEL, api_base=url, api_key="none", max_tokens=8).complete("春风").text


def case_stream(url: str) -> None:
    assert "".join(piece.delta or "" for piece in _model(url).stream_chat(MESSAGES))


def case_structured_answer_by_a_tool(url: str) -> None:
    check_answer(_model(url).as_structured_llm(Weather).chat(MESSAGES).raw)


def case_structured_answer_by_json_schema(url: str) -> None:
    model = _model(url, should_use_structured_outputs=True)
    check_answer(model.as_structured_llm(Weather).chat(MESSAGES).raw)


def case_tools(url: str) -> None:
    model, tool = _model(url), FunctionTool.from_defaults(temperature)
    found = model.chat_with_tools([tool], chat_history=MESSAGES, tool_required=True)
    assert [call.tool_name for call in model.get_tool_calls_from_response(found)] == ["temperature"]
