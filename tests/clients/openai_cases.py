"""openai for Python: chat, streams, `parse`, tools, completions, models, and what is not served."""

import openai
from questions import LIMIT, MODEL, QUESTION, TOOL, Weather, check_answer, check_arguments


def _client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def case_chat(url: str) -> None:
    asked = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 12}
    with _client(url) as client:
        whole = client.chat.completions.create(**asked)
        pieces = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content


def case_completions(url: str) -> None:
    found = _client(url).completions.create(model=MODEL, prompt="春风", max_tokens=6, logprobs=2, echo=True)
    assert found.choices[0].text.startswith("春风")


def case_models(url: str) -> None:
    assert [model.id for model in _client(url).models.list()] == [MODEL]
    assert _client(url).models.retrieve(MODEL).id == MODEL


def case_parse(url: str) -> None:
    found = _client(url).chat.completions.parse(model=MODEL, messages=QUESTION, max_tokens=LIMIT,
                                                response_format=Weather)
    check_answer(found.choices[0].message.parsed)


def case_parse_tools(url: str) -> None:
    found = _client(url).chat.completions.parse(
        model=MODEL, messages=QUESTION, max_tokens=LIMIT, tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required", parallel_tool_calls=False)
    check_answer(found.choices[0].message.tool_calls[0].function.parsed_arguments)


def case_stream_of_tools(url: str) -> None:
    with _client(url).chat.completions.stream(model=MODEL, messages=QUESTION, max_tokens=LIMIT, tools=[TOOL],
                                              tool_choice="required") as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert found.finish_reason == "tool_calls"
    check_arguments(found.message.tool_calls[0].function.arguments)


def case_result_of_a_tool(url: str) -> None:
    with _client(url) as client:
        called = client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=LIMIT, tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "Weather"}}).choices[0].message
        result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "晴"}
        answer = client.chat.completions.create(model=MODEL, messages=[*QUESTION, called, result], max_tokens=12,
                                                tools=[TOOL])
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def case_length_limit_of_parse(url: str) -> None:
    try:
        _client(url).chat.completions.parse(model=MODEL, messages=QUESTION, max_tokens=3, response_format=Weather)
    except openai.LengthFinishReasonError:
        return
    raise AssertionError("an answer that was cut off was parsed")


def _is_refused(call, status: int) -> None:
    found = 200
    try:
        call()
    except openai.APIStatusError as error:
        found = error.status_code
    assert found == status


def case_responses_are_not_implemented(url: str) -> None:
    _is_refused(lambda: _client(url).responses.create(model=MODEL, input="你好"), 501)


def case_embeddings_are_not_served(url: str) -> None:
    _is_refused(lambda: _client(url).embeddings.create(model=MODEL, input="你好"), 404)


def case_images_are_refused(url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    _is_refused(lambda: _client(url).chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": [part]}]), 400)
