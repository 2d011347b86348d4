"""huggingface_hub's InferenceClient."""

from huggingface_hub import InferenceClient
from questions import LIMIT, QUESTION, TOOL, Weather, check_arguments


def _client(url: str) -> InferenceClient:
    return InferenceClient(base_url=url.removesuffix("/v1"))


def case_chat(url: str) -> None:
    assert _client(url).chat_completion(QUESTION, max_tokens=8).choices[0].message.content


def case_stream(url: str) -> None:
    client = _client(url)  # a client without a name is closed before its stream is read
    pieces = client.chat_completion(QUESTION, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces)


def case_json_schema(url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "Weather", "schema": Weather.model_json_schema(),
                                                   "strict": True}}
    found = _client(url).chat_completion(QUESTION, max_tokens=LIMIT, response_format=form)
    check_arguments(found.choices[0].message.content)


def case_tools(url: str) -> None:
    found = _client(url).chat_completion(QUESTION, max_tokens=LIMIT, tools=[TOOL], tool_choice="required")
    check_arguments(found.choices[0].message.tool_calls[0].function.arguments)
