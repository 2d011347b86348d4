"""The HTTP API of a running server, by raw HTTP."""

import importlib
import json
import shutil
import socket
import sys
import threading
import time
from dataclasses import replace

import httpx
import pytest
from server_process import serving

from gptq_belle import load
from gptq_belle.engine.sampling_params import DEFAULT_SAMPLING
from gptq_belle.errors import HardwareError

QUESTION = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def server(tiny_bloom, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(tiny_bloom, log, "--max-batch", "4", "--cache", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def model(tiny_bloom):
    return load(tiny_bloom, device="cpu", cache="float32")


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def chat(client, **fields):
    return client.post("/v1/chat/completions", json={"messages": QUESTION, "temperature": 0, "max_tokens": 12} | fields)


def events(response):
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]


def test_chat_answer_equals_the_model(client, model, tiny_bloom):
    body = chat(client).json()
    expected = model.generate("你好", prompt_style="auto", max_new_tokens=12)
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert body["model"] == tiny_bloom.name
    read = len(model.tokenizer("Human: 你好\n\nAssistant:")["input_ids"])
    assert body["usage"] == {"prompt_tokens": read, "completion_tokens": 12, "total_tokens": read + 12,
                             "prompt_tokens_details": {"cached_tokens": 0}}


def test_stream_has_the_same_text_and_the_usage(client):
    found = events(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in found if event["choices"])
    whole = chat(client).json()
    assert text == whole["choices"][0]["message"]["content"]
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == whole["usage"]


def test_sampling_defaults_and_their_names(client, model):
    """Without options BELLE's own settings hold; `repeat_penalty` is llama.cpp's name of `repetition_penalty`."""
    body = {"messages": QUESTION, "max_tokens": 12, "seed": 5}
    for fields, penalty in (({}, DEFAULT_SAMPLING.repetition_penalty), ({"repeat_penalty": 1.0}, 1.0)):
        found = client.post("/v1/chat/completions", json=body | fields).json()["choices"][0]["message"]["content"]
        params = replace(DEFAULT_SAMPLING, max_new_tokens=12, seed=5, repetition_penalty=penalty)
        assert found == model.generate("你好", params, prompt_style="auto")


def test_choices_have_different_seeds(client, model):
    body = chat(client, n=3, seed=5, temperature=1.0).json()
    texts = [choice["message"]["content"] for choice in body["choices"]]
    alone = [model.generate("你好", replace(DEFAULT_SAMPLING, temperature=1.0, max_new_tokens=12, seed=5 + i),
                            prompt_style="auto") for i in range(3)]
    assert texts == alone
    assert len(set(texts)) > 1


def test_stop_strings_are_in_neither_text_nor_logprobs(client):
    text = chat(client).json()["choices"][0]["message"]["content"]
    stop = text[3:6]
    for fields in ({"stop": stop}, {"stop": [stop, "never there"]}):
        choice = chat(client, **fields, logprobs=True).json()["choices"][0]
        assert choice["message"]["content"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"
        told = "".join(one["token"] for one in choice["logprobs"]["content"])
        assert stop not in told
    streamed = events(chat(client, stop=stop, stream=True))
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed) == text[: text.index(stop)]


def test_logprobs_equal_the_model(client, model):
    import torch

    choice = chat(client, logprobs=True, top_logprobs=3, max_tokens=5).json()["choices"][0]["logprobs"]["content"]
    ids = model.tokenizer("Human: 你好\n\nAssistant:")["input_ids"]
    for one in choice:
        expected = model.logits(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
        best = expected.topk(3)
        assert one["logprob"] == pytest.approx(float(best.values[0]), abs=1e-4)
        assert [top["logprob"] for top in one["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert bytes(one["bytes"]).decode(errors="replace") == one["token"]
        ids.append(int(best.indices[0]))


def test_echo_returns_logprobs_of_the_prompt(client, model):
    import torch

    ids = model.tokenizer("人工智能正在改变我们的生活")["input_ids"]
    body = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}).json()
    found = body["choices"][0]["logprobs"]
    expected = model.logits(torch.tensor([ids]))[0].double().log_softmax(-1)[:-1].gather(
        1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(expected.tolist(), abs=1e-4)
    text = body["choices"][0]["text"]
    assert text == "人工智能正在改变我们的生活"
    before = [model.tokenizer.decode(ids[:place]).rstrip("\ufffd") for place in range(len(ids))]
    assert found["text_offset"] == [len(part) for part in before]
    assert body["usage"]["completion_tokens"] == 0


def test_completions_accept_text_and_token_ids(client, model):
    text, ids = "春风", model.tokenizer("春风")["input_ids"]
    expected = model.generate(ids, max_new_tokens=4)
    for prompt, count in ((text, 1), ([text, text], 2), (ids, 1), ([ids, ids], 2)):
        body = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, "temperature": 0}).json()
        assert [choice["text"] for choice in body["choices"]] == [expected] * count
        assert body["usage"]["prompt_tokens"] == count * len(ids)


@pytest.mark.parametrize(("fields", "param", "allowed"), [
    ({"temperature": -1}, "temperature", "0"),
    ({"top_p": 0}, "top_p", "0"),
    ({"max_tokens": "many"}, "max_tokens", "integer"),
    ({"n": 100}, "n", "16"),
    ({"messages": []}, "messages", "1"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'system'"),
    ({"max_tokens": 4000}, "messages", "256"),
    ({"messages": [{"role": "user", "content": "字" * 600}]}, "messages", "256"),
    ({"messages": [*QUESTION, {"role": "assistant", "content": "x"}]}, "messages", "user"),
])
def test_error_of_an_invalid_value_names_field_and_allowed_values(client, fields, param, allowed):
    response = chat(client, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert allowed in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"messages": 1}', b"\xff\xfe", b'{"messages": "x"}',
                                  b'{"messages": [{"role": "user", "content": "\\ud83d"}]}'])
def test_malformed_bodies_are_refused(client, body):
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_client_that_disconnects_frees_its_slot(client, server):
    def hang_up():
        with httpx.Client(base_url=server.url) as other, other.stream("POST", "/v1/chat/completions", json={
                "messages": QUESTION, "max_tokens": 200, "stream": True, "temperature": 0}) as response:
            next(response.iter_lines())

    threads = [threading.Thread(target=hang_up) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 10
    while (state := client.get("/health").json())["running"] + state["waiting"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert state["running"] == state["waiting"] == 0


def test_metrics_tokens_models_and_templates(client, model):
    chat(client)
    text = client.get("/metrics").text
    assert 'gptq_belle_requests_total{outcome="length"}' in text
    assert "gptq_belle_time_to_first_token_seconds_count" in text
    assert client.get("/v1/models").json()["data"][0]["id"] == model.path.name
    prompt = client.post("/apply-template", json={"messages": QUESTION}).json()["prompt"]
    assert prompt == "Human: 你好\n\nAssistant:"
    tokens = client.post("/tokenize", json={"prompt": prompt}).json()
    assert tokens["tokens"] == model.tokenizer(prompt)["input_ids"]
    assert client.post("/tokenize", json={"messages": QUESTION}).json()["tokens"] == tokens["tokens"]


def test_roles_of_clients_are_taken_merged_or_refused(client):
    def prompt(*messages):
        return client.post("/apply-template", json={"messages": list(messages)})

    user, empty = QUESTION[0], {"role": "assistant", "content": None}
    assert prompt(user, {"role": "user", "content": "再见"}).json()["prompt"] == "Human: 你好\n再见\n\nAssistant:"
    assert prompt({"role": "developer", "content": "简短。"}, user).json()["prompt"] == (
        "Human: 简短。\n你好\n\nAssistant:")
    assert prompt(user, empty, user).json() == prompt(user, {"role": "assistant", "tool_calls": []}, user).json()
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    assert prompt({"role": "user", "content": parts}).json() == prompt(user).json()
    for role in ("function", "critic"):
        refused = prompt({"role": role, "content": "2"}, user)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages.0.role")
        assert role in refused.json()["error"]["message"]
    for messages, param in (([user, empty], "messages"), ([empty, user], "messages"),
                            ([user, {"role": "tool", "content": "2"}], "messages"),
                            ([user, empty | {"tool_calls": [{"id": "1"}]}, user], "messages.1.tool_calls.0.function")):
        refused = prompt(*messages)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_own_chat_template_is_served_and_its_refusals_are_400(tiny_llama, tmp_path):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    (path / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if message['content'] == 'x' %}{{ raise_exception('no x') }}{% endif %}"
        "[{{ message['role'] }}]{{ message['content'] }}<pad>{% endfor %}[assistant]")
    with serving(path, tmp_path / "log") as server, httpx.Client(base_url=server.url, timeout=60) as client:
        asked = client.post("/apply-template", json={"messages": QUESTION}).json()
        assert asked["prompt"] == "[user]你好<pad>[assistant]"
        tokens = client.post("/tokenize", json={"messages": QUESTION}).json()["tokens"]
        assert chat(client).json()["usage"]["prompt_tokens"] == len(tokens)
        refused = chat(client, messages=[{"role": "user", "content": "x"}])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
        assert "no x" in refused.json()["error"]["message"]


def test_only_page_and_health_are_public(tiny_bloom, tmp_path):
    with serving(tiny_bloom, tmp_path / "log", "--api-key", "secret") as server:
        for path, status in (("/", 200), ("/static/chat.js", 200), ("/health", 200), ("/v1/models", 401),
                             ("/metrics", 401), ("/static/%2e%2e/app.py", 404)):
            assert httpx.get(server.url + path).status_code == status, path
        for key, status in (("secret", 200), ("secreT", 401), ("secret2", 401)):
            assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}
                             ).status_code == status
        assert server.end() == 0


def test_foreign_hosts_are_refused_without_a_key(server):
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}).status_code == 403


def test_large_bodies_are_refused_with_and_without_a_length(client):
    large = b'{"messages": "' + b"x" * (5 << 20) + b'"}'
    assert client.post("/v1/chat/completions", content=large).status_code == 413
    assert client.post("/v1/chat/completions", content=iter([large])).status_code == 413


def test_full_queue_answers_429_with_retry_after(tiny_bloom, tmp_path):
    with serving(tiny_bloom, tmp_path / "log", "--max-batch", "1", "--max-queue", "1") as server:
        def ask():
            return httpx.post(f"{server.url}/v1/chat/completions", timeout=60, json={
                "messages": QUESTION, "max_tokens": 150, "temperature": 0})

        found = []
        threads = [threading.Thread(target=lambda: found.append(ask())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [response for response in found if response.status_code == 429]
        assert refused
        assert all(response.headers["Retry-After"] == "1" for response in refused)
        assert len([response for response in found if response.status_code == 200]) == len(found) - len(refused) >= 2


def test_sigterm_finishes_running_requests(tiny_bloom, tmp_path):
    with serving(tiny_bloom, tmp_path / "log") as server, httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", timeout=60,
            json={"messages": QUESTION, "max_tokens": 100, "stream": True, "temperature": 0}) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.terminate()
        rest = list(lines)
        assert [line for line in rest if line][-1] == "data: [DONE]"
        assert server.process.wait(30) == 0


FAULTY_STEP = """
import time
from gptq_belle.cli import main
from gptq_belle.engine.batching import Engine
def step(self):
    {fault}
before, Engine.step = Engine.step, step
main()
"""


def test_failed_step_is_logged_once_and_ends_its_stream_with_an_error(tiny_bloom, tmp_path):
    program = ("-c", FAULTY_STEP.format(fault="raise RuntimeError('an injected fault')"))
    with serving(tiny_bloom, tmp_path / "log", program=program) as server:
        for number, stream in enumerate((True, False), start=1):
            response = httpx.post(f"{server.url}/v1/chat/completions", timeout=60,
                                  json={"messages": QUESTION, "stream": stream})
            assert "error" in json.loads(response.text.strip().split("\n")[-1].removeprefix("data: "))
            assert server.log.count("RuntimeError: an injected fault") == number
            assert server.log.count("Traceback") == number
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_request_that_takes_too_long_in_the_queue_or_altogether_is_answered(tiny_bloom, tmp_path):
    slow = ("-c", FAULTY_STEP.format(fault="time.sleep(0.2); return before(self)"))
    options = ("--max-batch", "1", "--request-timeout", "2", "--queue-timeout", "0.5")
    with serving(tiny_bloom, tmp_path / "log", *options, program=slow) as server:
        def ask(found, **fields):
            found.append(httpx.post(f"{server.url}/v1/chat/completions", timeout=60, json={
                "messages": QUESTION, "max_tokens": 100, "ignore_eos": True} | fields))

        running, waiting = [], []
        first = threading.Thread(target=ask, args=(running,))
        first.start()
        while not httpx.get(f"{server.url}/health").json()["running"]:
            time.sleep(0.02)
        ask(waiting)
        ask(waiting, stream=True)
        first.join()
        assert (running[0].status_code, running[0].json()["error"]["code"]) == (504, "request_timeout")
        assert (waiting[0].status_code, waiting[0].json()["error"]["code"]) == (503, "queue_timeout")
        assert int(waiting[0].headers["Retry-After"]) > 0
        assert json.loads(waiting[1].text.strip().split("\n")[-1][6:])["error"]["code"] == "queue_timeout"
        time.sleep(0.5)
        state = httpx.get(f"{server.url}/health").json()
        assert (state["status"], state["running"], state["waiting"]) == ("ok", 0, 0)


@pytest.mark.parametrize("fault", ["raise SystemExit(0)", "return [object()]", "time.sleep(60)"])
def test_server_whose_engine_stops_answers_503_and_exits_with_an_error(tiny_bloom, tmp_path, fault):
    with serving(tiny_bloom, tmp_path / "log", "--engine-timeout", "1",
                 program=("-c", FAULTY_STEP.format(fault=fault))) as server:
        assert httpx.post(f"{server.url}/v1/chat/completions", timeout=60,
                          json={"messages": QUESTION}).status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port)) as unfinished:
            unfinished.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            assert server.process.wait(30) == 1
        assert "Traceback" in server.log
        assert "in step" in server.log or "in _deliver" in server.log


@pytest.mark.parametrize(("options", "code", "words"), [
    (("--host", "0.0.0.0"), 2, "--allow-unauthenticated"),
    (("--max-len", "1"), 2, "max-len"),
])
def test_invalid_serve_options_exit_2(tiny_bloom, options, code, words):
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "gptq_belle.cli", "serve", str(tiny_bloom), *options],
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == code
    assert words in done.stderr


def test_model_that_cannot_be_loaded_exits_4(tmp_path):
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "gptq_belle.cli", "serve", str(tmp_path), "--port", "0"],
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 4
    assert "config.json" in done.stderr


@pytest.mark.parametrize(("missing", "error"), [("uvicorn", HardwareError), ("gptq_belle.serving.app", ImportError)])
def test_only_a_missing_extra_is_reported_as_one(monkeypatch, missing, error):
    monkeypatch.delitem(sys.modules, "gptq_belle.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(error, match=missing):
        importlib.import_module("gptq_belle.serving.server")
