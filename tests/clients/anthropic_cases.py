"""anthropic: its messages are not implemented, and say so."""

import anthropic
from questions import MODEL, QUESTION


def case_messages_are_not_implemented(url: str) -> None:
    client, found = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none"), None
    try:
        client.messages.create(model=MODEL, max_tokens=8, messages=QUESTION)
    except anthropic.APIStatusError as error:
        found = error
    assert found is not None
    assert found.status_code == 501
    assert "/v1/chat/completions" in str(found)
