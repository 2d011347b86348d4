"""The server with the clients of OpenAI and Hugging Face, and with fuzzed request bodies."""

import json
import random

import httpx
import pytest
from server_process import serving

openai = pytest.importorskip("openai", reason="pip install openai")
QUESTION = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def server(tiny_llama, tmp_path_factory):
    with serving(tiny_llama, tmp_path_factory.mktemp("log") / "log", "--max-batch", "4") as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat(client, tiny_llama):
    asked = {"model": tiny_llama.name, "messages": QUESTION, "temperature": 0, "max_tokens": 10}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert whole.usage.completion_tokens == 10
    assert len(whole.choices[0].logprobs.content) == 10
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        pieces = list(stream)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].usage == whole.usage


def test_openai_completions(client, tiny_llama):
    asked = {"model": tiny_llama.name, "prompt": "春风", "temperature": 0, "max_tokens": 6}
    whole = client.completions.create(**asked, logprobs=2, echo=True)
    assert whole.choices[0].text.startswith("春风")
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    assert len(whole.choices[0].logprobs.tokens) == whole.usage.total_tokens
    streamed = "".join(piece.choices[0].text for piece in client.completions.create(**asked, stream=True))
    assert "春风" + streamed == whole.choices[0].text
    assert [model.id for model in client.models.list()] == [tiny_llama.name]


@pytest.mark.parametrize(("fields", "error"), [
    ({"temperature": -1}, openai.BadRequestError), ({"max_tokens": 5000}, openai.BadRequestError),
    ({"timeout": 0.001}, openai.APITimeoutError)])
def test_openai_errors_are_typed(client, tiny_llama, fields, error):
    with pytest.raises(error):
        client.chat.completions.create(**{"model": tiny_llama.name, "messages": QUESTION, "max_tokens": 100} | fields)


def test_hugging_face_client(server, monkeypatch):
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # it would refuse even this machine's own address
    client = InferenceClient(base_url=server.url)
    whole = client.chat_completion(QUESTION, max_tokens=8, temperature=0, seed=1)
    pieces = client.chat_completion(QUESTION, max_tokens=8, temperature=0, seed=1, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content


MUTATIONS = (None, True, -1, 0, 1.5, 1e308, "", "x", "\ud800", [], {}, [None], [[]], {"a": 1}, 1 << 70, "null")


def mutated(value, random):
    """A mutated request body."""
    if random.random() < 0.15:
        return random.choice(MUTATIONS)
    if isinstance(value, dict):
        kept = {key: mutated(item, random) for key, item in value.items() if random.random() > 0.05}
        return kept | ({random.choice("abc"): random.choice(MUTATIONS)} if random.random() < 0.1 else {})
    if isinstance(value, list):
        return [mutated(item, random) for item in value for _ in range(random.choice((1, 1, 1, 0, 2)))]
    return value


BODIES = {
    "/v1/chat/completions": {
        "messages": QUESTION, "max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "n": 1, "stop": ["x"],
        "logprobs": True, "top_logprobs": 2, "seed": 1, "stream": False, "stream_options": {"include_usage": True},
        "min_p": 0.1, "repetition_penalty": 1.1},
    "/v1/completions": {"prompt": [5, 6, 7], "max_tokens": 1, "echo": True, "logprobs": 1, "n": 1, "stop": "x"},
    "/tokenize": {"prompt": "春风", "add_special_tokens": True},
    "/apply-template": {"messages": QUESTION},
}


def bombard(server, count, seed):
    """Statuses of the responses to `count` mutated bodies."""
    draw, statuses = random.Random(seed), {}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(count):
            path = draw.choice(list(BODIES))
            body = mutated(BODIES[path], draw)
            content = json.dumps(body).encode("utf-8", "surrogatepass")
            if draw.random() < 0.1:
                place = draw.randrange(len(content) + 1)
                content = content[:place] + draw.randbytes(3) + content[place + draw.randrange(4):]
            response = client.post(path, content=content, headers={"Content-Type": "application/json"})
            statuses.setdefault(response.status_code, []).append(content)
    return statuses


def check_fuzzed(server, count):
    statuses = bombard(server, count, count)
    assert set(statuses) <= {200, 400}, {status: bodies[:3] for status, bodies in statuses.items()}
    assert statuses[200]
    assert statuses[400]
    assert httpx.get(f"{server.url}/health").json()["running"] == 0


def test_mutated_bodies_are_accepted_or_refused(server):
    check_fuzzed(server, 300)


@pytest.mark.slow
def test_ten_thousand_mutated_bodies(server):
    check_fuzzed(server, 10_000)


def check_schema(server, examples):
    """Send bodies generated by schemathesis for each operation of /openapi.json."""
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema, seen = schemathesis.openapi.from_url(f"{server.url}/openapi.json"), []
    for operation in schema.get_all_operations():
        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.ok().as_strategy())
        def answers(case):
            if isinstance(case.body, dict):
                for field in ("max_tokens", "max_completion_tokens"):
                    if isinstance(case.body.get(field), int):
                        case.body[field] = min(case.body[field], 2)
            response = case.call(timeout=60)
            seen.append(response.status_code)
            assert response.status_code < 500, response.text

        answers()
    assert httpx.get(f"{server.url}/health").json()["running"] == 0
    return seen


def test_some_generated_bodies(server):
    assert len(check_schema(server, 10)) > 40


@pytest.mark.slow
def test_many_generated_bodies(server):
    assert len(check_schema(server, 400)) > 1000
