"""Request fields that the server does not implement, models and numbers of answers that it does not serve."""

import json
import re
from pathlib import Path

import httpx
import pytest
from server_process import serving

import gptq_belle
from gptq_belle.serving.api_errors import ApiError
from gptq_belle.serving.request_fields import CHAT, COMPLETION, STREAM_OPTIONS, TOKENIZE, check_fields
from gptq_belle.serving.schemas import ChatRequest, CompletionRequest, StreamOptions, TokenizeRequest
from gptq_belle.serving.server_config import ServiceConfig

CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"
BODIES = {CHAT_PATH: {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 1},
          COMPLETION_PATH: {"prompt": "春风", "max_tokens": 1}}
TOOL = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def server(tiny_llama, tmp_path_factory):
    with serving(tiny_llama, tmp_path_factory.mktemp("log") / "log", "--max-batch", "2", "--max-queue", "6") as running:
        yield running


def post(server, path, **fields):
    return httpx.post(server.url + path, json=BODIES[path] | fields, timeout=60)


def error_of(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.mark.parametrize(("path", "name", "value"), [
    (CHAT_PATH, "presence_penalty", 2.1), (CHAT_PATH, "frequency_penalty", -3), (CHAT_PATH, "presence_penalty", "x"),
    (CHAT_PATH, "presence_penalty", False), (CHAT_PATH, "logit_bias", {"384": 100}),
    (CHAT_PATH, "logit_bias", [[5, 1]]),
    (CHAT_PATH, "max_tokens", 0), (CHAT_PATH, "max_tokens", -1), (CHAT_PATH, "max_tokens", 1.5),
    (COMPLETION_PATH, "max_tokens", 0), (COMPLETION_PATH, "max_tokens", -1), (COMPLETION_PATH, "stop_token_ids", [384]),
    (CHAT_PATH, "response_format", {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "wat"}}}),
    (CHAT_PATH, "tool_choice", "required"), (CHAT_PATH, "functions", [{"name": "f"}]), (COMPLETION_PATH, "tools", TOOL),
    (CHAT_PATH, "min_tokens", 2), (CHAT_PATH, "guided_json", "{"), (CHAT_PATH, "add_generation_prompt", False),
    (CHAT_PATH, "guided_choice", ["甲", ""]), (CHAT_PATH, "guided_regex", "[0-9"), (CHAT_PATH, "grammar", "root ::= x"),
    (CHAT_PATH, "json_schema", {"type": "object", "properties": 5}),
    (CHAT_PATH, "bad_words", ["京"]), (CHAT_PATH, "mirostat", 2),
    (CHAT_PATH, "xtc_probability", 1.0), (CHAT_PATH, "dry_multiplier", 5.0),
    (CHAT_PATH, "n_predict", 4), (CHAT_PATH, "modalities", ["text", "audio"]), (CHAT_PATH, "reasoning_effort", "high"),
    (COMPLETION_PATH, "continue_final_message", True), (CHAT_PATH, "chat_template_kwargs", {"enable_thinking": False}),
    (CHAT_PATH, "skip_special_tokens", False), (CHAT_PATH, "prompt_logprobs", 0), (CHAT_PATH, "echo", True),
    (COMPLETION_PATH, "best_of", 3), (COMPLETION_PATH, "suffix", "。"), (COMPLETION_PATH, "n_predict", -1),
    (COMPLETION_PATH, "max_completion_tokens", 3), (COMPLETION_PATH, "top_logprobs", 2),
    (COMPLETION_PATH, "allowed_token_ids", [5]), (COMPLETION_PATH, "use_beam_search", True),
    (CHAT_PATH, "temprature", 0.1), (COMPLETION_PATH, "options", {"seed": 1})])
def test_field_without_an_implementation_is_refused_by_name(server, path, name, value):
    error = error_of(post(server, path, **{name: value}), 400)
    assert error["param"] == name
    assert name in error["message"]


@pytest.mark.parametrize(("path", "fields"), [
    (CHAT_PATH, {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "auto",
                 "response_format": {"type": "text"}, "min_tokens": 0, "stop_token_ids": [], "best_of": 1,
                 "n_predict": -1, "max_tokens": 1.0, "add_generation_prompt": True,
                 "modalities": ["text"], "service_tier": "auto"}),
    (CHAT_PATH, {"user": "somebody", "metadata": {"run": "1"}, "store": False, "parallel_tool_calls": True,
                 "prompt_cache_key": "k", "cache_prompt": True}),
    (CHAT_PATH, {"grammar": "", "guided_json": None, "repeat_penalty": 1.0, "repeat_last_n": 64, "mirostat": 0,
                 "mirostat_tau": 5.0, "typical_p": 1.0, "dry_multiplier": 0.0, "dry_base": 1.75, "something": None}),
    (CHAT_PATH, {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}),
    (COMPLETION_PATH, {"best_of": 1, "suffix": None, "logit_bias": None, "user": "somebody", "top_logprobs": 0})])
def test_neutral_values_and_fields_that_change_no_answer_are_accepted(server, path, fields):
    assert post(server, path, **fields).status_code == 200


def chosen(server, **fields):
    greedy = {"max_tokens": 24, "temperature": 0, "repetition_penalty": 1, "ignore_eos": True}
    response = post(server, CHAT_PATH, **greedy | fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_penalties_bias_and_lengths_equal_the_model(server, tiny_llama):
    model = gptq_belle.load(tiny_llama, device="cpu")
    for fields in ({"presence_penalty": 2}, {"frequency_penalty": 0.5}, {"logit_bias": {"70": 50.0, "71": 49.0}},
                   {"min_tokens": 9, "ignore_eos": False}, {"stop_token_ids": [70], "logit_bias": {"70": 100}}):
        options = dict(fields)
        if "logit_bias" in options:
            options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
        expected = model.generate("你好", prompt_style="auto", max_new_tokens=24,
                                  **{"ignore_eos": True} | options)
        assert chosen(server, **fields)["message"]["content"] == expected, fields
    assert chosen(server, presence_penalty=2)["message"] != chosen(server)["message"]


def test_penalties_beside_the_default_repetition_penalty_give_a_warning(server):
    for path in (CHAT_PATH, COMPLETION_PATH):
        for stream in (False, True):
            warning = post(server, path, presence_penalty=1, stream=stream).headers["Warning"]
            assert "presence_penalty" in warning
            assert "repetition_penalty" in warning
        for fields in ({}, {"presence_penalty": 0}, {"presence_penalty": 1, "repetition_penalty": 1}):
            assert "Warning" not in post(server, path, **fields).headers


def test_stop_strings_within_the_minimum_are_ignored(server):
    text = chosen(server)["message"]["content"]
    assert chosen(server, stop=text[2:4])["message"]["content"] == text[:2]
    longer = chosen(server, stop=text[2:4], min_tokens=20)["message"]["content"]
    assert longer.startswith(text[:4])


def test_final_message_of_the_assistant_is_continued(server, tiny_llama):
    model, opening = gptq_belle.load(tiny_llama, device="cpu"), {"role": "assistant", "content": "北京是"}
    messages = [*BODIES[CHAT_PATH]["messages"], opening]
    prompt = httpx.post(server.url + "/apply-template", json={"messages": messages, "continue_final_message": True})
    assert prompt.json()["prompt"] == "Human: 你好 \n\nAssistant: 北京是"
    options = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert chosen(server, **options)["message"]["content"] == model.generate(
        prompt.json()["prompt"], max_new_tokens=24, ignore_eos=True)
    empty = {"messages": [*messages[:1], opening | {"content": ""}], "continue_final_message": True}
    assert chosen(server, **empty) == chosen(server)
    for refused, param in ((options | {"add_generation_prompt": True}, "continue_final_message"),
                           ({"continue_final_message": True}, "messages")):
        assert error_of(post(server, CHAT_PATH, **refused), 400)["param"] == param


def test_cached_prompt_tokens_are_counted_once_per_prompt(server):
    question = {"messages": [{"role": "user", "content": "春" * 60}]}
    first, second = (post(server, CHAT_PATH, **question, n=2).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert 64 <= cached < second["prompt_tokens"] == first["prompt_tokens"]


def test_unsupported_stream_option_is_refused_by_name(server):
    error = error_of(post(server, CHAT_PATH, stream=True, stream_options={"continuous_usage_stats": True}), 400)
    assert error["param"] == "stream_options.continuous_usage_stats"


@pytest.mark.parametrize(("table", "schema"), [
    (CHAT, ChatRequest), (COMPLETION, CompletionRequest), (STREAM_OPTIONS, StreamOptions),
    (TOKENIZE, TokenizeRequest)])
def test_no_implemented_field_is_in_the_table(table, schema):
    assert not table.keys() & schema.model_fields.keys()


def test_every_parameter_of_the_openai_client_is_known():
    pytest.importorskip("openai", reason="pip install openai")
    from openai.types import chat, completion_create_params

    for params, table, schema in ((chat.completion_create_params, CHAT, ChatRequest),
                                  (completion_create_params, COMPLETION, CompletionRequest)):
        names = params.CompletionCreateParamsBase.__annotations__.keys()
        assert len(names) > 15
        assert names <= table.keys() | schema.model_fields.keys()


@pytest.mark.parametrize(("path", "name", "value"), [
    ("/tokenize", "with_pieces", True), ("/tokenize", "content", "x"), ("/tokenize", "add_generation_prompt", False),
    ("/tokenize", "something", 1), ("/apply-template", "functions", TOOL), ("/apply-template", "chat_template", "x"),
    ("/apply-template", "add_generation_prompt", False), ("/tokenize", "model", "other"),
    ("/apply-template", "model", "other")])
def test_field_that_would_change_a_prompt_is_refused_by_name(server, path, name, value):
    body = {"messages": BODIES[CHAT_PATH]["messages"]}
    assert httpx.post(server.url + path, json=body).status_code == 200
    status = 404 if name == "model" else 400
    assert error_of(httpx.post(server.url + path, json=body | {name: value}), status)["param"] == name


def test_template_of_a_chat_request_with_sampling_fields(server):
    fields = {"temperature": 0.5, "stop": ["x"], "presence_penalty": 0}
    assert httpx.post(server.url + "/apply-template", json=BODIES[CHAT_PATH] | fields).status_code == 200


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_apis_without_an_implementation_name_the_one_to_use(server, path):
    response = httpx.post(server.url + path, json=BODIES[CHAT_PATH])
    assert CHAT_PATH in error_of(response, 501)["message"]
    assert response.headers["x-should-retry"] == "false"


def test_name_that_cannot_be_encoded_is_refused():
    with pytest.raises(ApiError) as refused:
        check_fields({"\ud800": 1}, CHAT)
    json.dumps(refused.value.body, ensure_ascii=False).encode()


@pytest.mark.parametrize("stop", ["", [""], [], None, ["", ""]])
def test_empty_stop_strings_stop_nothing(server, stop):
    def answer(**fields):
        return post(server, CHAT_PATH, max_tokens=6, temperature=0, ignore_eos=True, **fields).json()["choices"]

    assert answer(stop=stop) == answer()


INSIDES = re.compile(r"function-|functools|<function|0x[0-9a-f]{4}|validator|constrained|\[str\]|nullable|TextPart|"
                     "extract")


@pytest.mark.parametrize(("path", "fields", "param"), [
    (CHAT_PATH, {"stop": 5}, "stop"), (CHAT_PATH, {"stop": [5]}, "stop.0"), (CHAT_PATH, {"stop": {"a": 1}}, "stop"),
    (CHAT_PATH, {"stop": ["x" * 300]}, "stop.0"), (CHAT_PATH, {"stop": ["x"] * 17}, "stop"),
    (CHAT_PATH, {"stop": ["x", "\ud800"]}, "stop.1"), (CHAT_PATH, {"messages": "x"}, "messages"),
    (CHAT_PATH, {"messages": ["x"]}, "messages.0"), (CHAT_PATH, {"messages": [{"content": "x"}]}, "messages.0.role"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
    (CHAT_PATH, {"stream_options": 1}, "stream_options"), (CHAT_PATH, {"logit_bias": {"x": 1}}, "logit_bias.x"),
    (CHAT_PATH, {"logit_bias": {"5": 101}}, "logit_bias.5"), (CHAT_PATH, {"stop_token_ids": [-1]}, "stop_token_ids.0"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": "x", "prefix": True}]}, "messages.0.prefix"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": "x", "nmae": "y"}]}, "messages.0.nmae"),
    (COMPLETION_PATH, {"prompt": 5}, "prompt"), (COMPLETION_PATH, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETION_PATH, {"prompt": None}, "prompt"), (COMPLETION_PATH, {"prompt": []}, "prompt"),
    (COMPLETION_PATH, {"prompt": [None]}, "prompt.0"), (COMPLETION_PATH, {"prompt": [5, -1]}, "prompt.1"),
    (COMPLETION_PATH, {"prompt": [[5], [5, "x"]]}, "prompt.1.1"), (COMPLETION_PATH, {"prompt": [[]]}, "prompt.0")])
def test_wrong_type_is_refused_without_names_of_the_implementation(server, path, fields, param):
    body = json.dumps(BODIES[path] | fields).encode("utf-8", "surrogatepass")
    response = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"}, timeout=60)
    error = error_of(response, 400)
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert not INSIDES.search(response.text), response.text


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH, "/tokenize", "/apply-template"])
@pytest.mark.parametrize("headers", [{"Content-Type": "application/x-www-form-urlencoded"}, {}, {
    "Content-Type": "text/plain; charset=utf-8"}, {"Content-Type": "multipart/form-data; boundary=x"}])
def test_body_with_another_content_type_is_refused(server, path, headers):
    body = json.dumps(BODIES[CHAT_PATH] | {"prompt": "x"}).encode()
    error = error_of(httpx.post(server.url + path, content=body, headers=headers), 415)
    assert "application/json" in error["message"]


def test_json_content_type_may_have_parameters(server):
    response = httpx.post(server.url + COMPLETION_PATH, content=json.dumps(BODIES[COMPLETION_PATH]).encode(),
                          headers={"Content-Type": "Application/JSON; charset=utf-8"}, timeout=60)
    assert response.status_code == 200


@pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"x"', b""])
def test_body_that_is_no_object_is_refused(server, body):
    response = httpx.post(server.url + CHAT_PATH, content=body, headers={"Content-Type": "application/json"})
    error_of(response, 400)
    assert not INSIDES.search(response.text)


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
@pytest.mark.parametrize("model", ["no-such-model", "gpt-4o", "\u6a21\u578b", "llama/../x", "x" * 5000])
def test_model_that_is_not_served_is_refused_by_name(server, path, model):
    error = error_of(post(server, path, model=model), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert model[:100] in error["message"]
    assert len(error["message"]) < 1000


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
def test_served_model_and_placeholders_of_clients_are_answered(server, path, tiny_llama):
    for model in (tiny_llama.name, None, "", "default", "dummy"):
        response = post(server, path, model=model)
        assert (response.status_code, response.json()["model"]) == (200, tiny_llama.name), model


def test_models_are_found_by_their_served_names(tiny_llama, tmp_path):
    names = ("--served-model-name", "belle/7b", "--served-model-name", "belle")
    with serving(tiny_llama, tmp_path / "log", *names) as server:
        models = httpx.get(server.url + "/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["belle/7b", "belle"]
        assert [httpx.get(f"{server.url}/v1/models/{model['id']}").json() for model in models] == models
        for model in ("belle/7b", "belle", None):
            assert post(server, CHAT_PATH, model=model).json()["model"] == "belle/7b"
        assert error_of(post(server, CHAT_PATH, model=tiny_llama.name), 404)["code"] == "model_not_found"
        for name in ("other", "default", "belle/"):
            assert error_of(httpx.get(f"{server.url}/v1/models/{name}"), 404)["param"] == "model"


def test_tokens_become_text_again(server):
    ids = httpx.post(server.url + "/tokenize", json={"prompt": "春风</s>"}).json()["tokens"]
    assert httpx.post(server.url + "/detokenize", json={"tokens": ids}).json() == {"prompt": "春风</s>"}
    assert httpx.post(server.url + "/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    assert error_of(httpx.post(server.url + "/detokenize", json={"tokens": [384]}), 400)["param"] == "tokens"


@pytest.mark.parametrize(("path", "fields"), [
    (COMPLETION_PATH, {"prompt": ["一"] * 200, "n": 16}), (COMPLETION_PATH, {"prompt": ["一"] * 9}),
    (COMPLETION_PATH, {"prompt": [[5]] * 3, "n": 3, "echo": True}), (CHAT_PATH, {"n": 9}),
    (CHAT_PATH, {"n": 16, "stream": True})])
def test_more_answers_than_slots_and_queue_hold_are_refused_for_good(server, path, fields):
    response = post(server, path, **fields)
    assert error_of(response, 400)["param"] == "n"
    assert "Retry-After" not in response.headers


def test_as_many_answers_as_slots_and_queue_hold_are_accepted(server):
    assert len(post(server, COMPLETION_PATH, prompt=["一"] * 4, n=2).json()["choices"]) == 8


def test_a_linked_directory_is_served_by_the_name_of_the_link(tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.chdir(tmp_path / "target")
    assert ServiceConfig(tmp_path / "link").names == ("link",)
    assert ServiceConfig(Path(".")).names == ("target",)
