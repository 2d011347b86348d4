"""litellm, with the provider openai and with hosted_vllm."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would read the list of prices from the internet

import litellm  # noqa: E402
from questions import LIMIT, MODEL, QUESTION, TOOL, Weather, check_arguments  # noqa: E402

litellm.telemetry = False


def _ask(url: str, provider: str = "openai", **fields):
    return litellm.completion(model=f"{provider}/{MODEL}", api_base=url, api_key="none", messages=QUESTION,
                              max_tokens=LIMIT, num_retries=0, **fields)


def case_chat(url: str) -> None:
    assert _ask(url).choices[0].message.content


def case_chat_as_vllm(url: str) -> None:
    assert _ask(url, "hosted_vllm").choices[0].message.content


def case_stream(url: str) -> None:
    assert "".join(piece.choices[0].delta.content or "" for piece in _ask(url, stream=True))


def case_json_schema(url: str) -> None:
    Weather.model_validate_json(_ask(url, response_format=Weather).choices[0].message.content)


def case_tools(url: str) -> None:
    found = _ask(url, tools=[TOOL], tool_choice="required").choices[0]
    assert found.finish_reason == "tool_calls"
    check_arguments(found.message.tool_calls[0].function.arguments)


def case_stream_of_tools(url: str) -> None:
    pieces = list(_ask(url, tools=[TOOL], tool_choice="required", stream=True))
    found = litellm.stream_chunk_builder(pieces, messages=QUESTION)
    check_arguments(found.choices[0].message.tool_calls[0].function.arguments)
