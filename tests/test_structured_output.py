"""Answers that follow a JSON schema, a regular expression, a choice or a grammar, by HTTP, in Python and on the command
line."""

import json
import re
import subprocess
import sys

import httpx
import pytest
import torch
from conftest import naming, tiny_tokenizer
from server_process import serving

from gptq_belle import load
from gptq_belle.engine.batching import Engine
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.token_constraint import ConstraintCompiler
from gptq_belle.errors import UsageError

pytest.importorskip("llguidance", reason="pip install llguidance")
SCHEMA = {"type": "object", "properties": {"城市": {"enum": ["北京", "上海"]}, "n": {"type": "integer", "minimum": 0,
          "maximum": 99}, "ok": {"type": "boolean"}}, "required": ["城市", "n", "ok"], "additionalProperties": False}
WORDS = "[a-c]{2,4}-[0-9]{3}"
GBNF = 'root ::= ("甲" | "乙") number\nnumber ::= [0-9] [0-9]'


def follows_schema(text):
    found = json.loads(text)
    return (found.keys() == set(SCHEMA["properties"]) and found["城市"] in ("北京", "上海") and type(found["n"]) is int
            and 0 <= found["n"] <= 99 and type(found["ok"]) is bool)


FORMS = [({"json_schema": SCHEMA}, follows_schema), ({"regex": WORDS}, re.compile(WORDS).fullmatch),
         ({"choice": ("甲乙", 'a "quoted" \\ text', "丙")}, {"甲乙", 'a "quoted" \\ text', "丙"}.__contains__),
         ({"grammar": GBNF}, re.compile("[甲乙][0-9]{2}").fullmatch),
         ({"grammar": 'start: "x" /[yz]{3}/'}, re.compile("x[yz]{3}").fullmatch)]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load(tiny_llama, device="cpu")


@pytest.fixture(scope="module")
def server(tiny_bloom, tmp_path_factory):
    with serving(tiny_bloom, tmp_path_factory.mktemp("log") / "log", "--max-batch", "4") as running:
        yield running


@pytest.mark.parametrize(("form", "follows"), FORMS)
def test_sampled_answers_follow_their_form(model, form, follows):
    for seed in range(4):
        answer = model.generate("你好", prompt_style="auto", temperature=1.5, seed=seed, max_new_tokens=150, **form)
        assert follows(answer), answer
    assert follows(model.generate("你好", max_new_tokens=150, ignore_eos=True, **form))
    assert all(map(follows, model.generate(["一", "二"], temperature=1.0, seed=1, max_new_tokens=150, **form)))


def test_constrained_answers_do_not_change_others_in_their_batch(model):
    free, bound = SamplingParams(max_new_tokens=30, ignore_eos=True), SamplingParams(max_new_tokens=30, regex="[0-9]+")
    engine = Engine(model, 3)
    requests = [engine.submit([5, 6, 7], params, model.constraint(params)) for params in (free, bound, free)]
    while not engine.idle:
        engine.step()
    expected = list(model.tokens([5, 6, 7], 30, free))
    assert [requests[0].answer, requests[2].answer] == [expected, expected]
    assert re.fullmatch("[0-9]+", model.tokenizer.decode(requests[1].answer))


def test_excluded_tokens_are_those_that_no_answer_continues_with():
    tokenizer = tiny_tokenizer()
    vocabulary = 400  # more than the tokenizer has, as in models with padded embeddings
    constraint = ConstraintCompiler(tokenizer, vocabulary, [2])(SamplingParams(regex="(12|3)x"))
    texts = [tokenizer.decode([token]) if token < len(tokenizer) else "" for token in range(vocabulary)]

    def allowed():
        assert constraint.advance() is None
        return {texts[token] or token for token in torch.nonzero(~constraint.excluded())[:, 0].tolist()}

    assert allowed() == {"1", "3"} | ({"12"} & set(texts))
    constraint.accept(texts.index("3"))
    other = constraint.copy()
    assert allowed() == {"x"}
    constraint.accept(texts.index("x"))
    assert allowed() == {"</s>"}
    assert other.advance() is None
    assert not other.excluded()[texts.index("x")]


@pytest.mark.parametrize("form", [{"json_schema": {"type": "wat"}}, {"regex": "[0-9"}, {"grammar": "root ::= x"},
                                  {"json_schema": {"$ref": "http://x/y"}}])
def test_invalid_form_is_refused_by_its_name(model, form):
    with pytest.raises(UsageError, match=naming(*form)):
        model.generate("你好", **form)


@pytest.mark.parametrize("form", [{"json_schema": SCHEMA, "regex": WORDS}, {"regex": 5}, {"choice": "x"},
                                  {"json_schema": [1]}])
def test_form_of_another_type_or_two_are_refused(form):
    with pytest.raises(UsageError, match=naming(*form)):
        SamplingParams(**form)


FIELDS = [({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}},
           follows_schema),
          ({"response_format": {"type": "json_object", "schema": SCHEMA}}, follows_schema),
          ({"response_format": {"type": "json_object", "value": SCHEMA}}, follows_schema),
          ({"guided_json": SCHEMA}, follows_schema), ({"guided_json": json.dumps(SCHEMA)}, follows_schema),
          ({"json_schema": SCHEMA}, follows_schema), ({"structured_outputs": {"json": SCHEMA}}, follows_schema),
          ({"guided_regex": WORDS}, re.compile(WORDS).fullmatch),
          ({"guided_choice": ["甲", "乙"]}, {"甲", "乙"}.__contains__),
          ({"structured_outputs": {"choice": ["甲", "乙"]}}, {"甲", "乙"}.__contains__),
          ({"guided_grammar": GBNF}, re.compile("[甲乙][0-9]{2}").fullmatch),
          ({"grammar": GBNF}, re.compile("[甲乙][0-9]{2}").fullmatch)]


def ask(server, path="chat/completions", **fields):
    body = {"max_tokens": 150, "temperature": 1.0, "seed": 3} | fields
    body |= {"prompt": "你好"} if path == "completions" else {"messages": [{"role": "user", "content": "你好"}]}
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)


@pytest.mark.parametrize(("fields", "follows"), FIELDS)
def test_fields_of_openai_vllm_and_llama_cpp_constrain_the_answer(server, fields, follows):
    choices = ask(server, n=2, **fields).json()["choices"]
    assert all(follows(choice["message"]["content"]) for choice in choices), choices
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    assert follows(ask(server, "completions", **fields).json()["choices"][0]["text"])
    events = [json.loads(line[6:]) for line in ask(server, stream=True, **fields).text.splitlines()
              if line.startswith("data: {")]
    assert follows("".join(event["choices"][0]["delta"].get("content", "") for event in events))


def test_json_object_and_the_length_limit(server):
    options = {"response_format": {"type": "json_object"}, "logit_bias": {"96": 5}}  # some token, to vary the answer
    for seed in range(3):
        choice = ask(server, **options, seed=seed).json()["choices"][0]
        assert choice["message"]["content"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
    cut = ask(server, guided_regex="[ab]{40,}", max_tokens=4).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert set(cut["message"]["content"]) <= set("ab")


def test_schema_that_needs_more_tokens_than_allowed_ends_by_length(server):
    schema = {"type": "string", "minLength": 200}
    body = ask(server, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
               max_tokens=5).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(("fields", "param"), [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_object", "schemas": SCHEMA}}, "response_format.schemas"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "x"}, "response_format"),
    ({"structured_outputs": {"json": SCHEMA, "regex": "x"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"guided_json": "[1]"}, "guided_json"), ({"guided_json": {"type": "wat"}}, "guided_json"),
    ({"guided_choice": [1]}, "guided_choice.0"), ({"guided_regex": "("}, "guided_regex")])
def test_form_that_cannot_be_followed_is_refused(server, fields, param):
    response = ask(server, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("fields", [
    {"response_format": {"type": "text"}}, {"response_format": None}, {"guided_json": {}}, {"guided_choice": []},
    {"grammar": ""}, {"structured_outputs": {"json": None}}])
def test_empty_forms_constrain_nothing(server, fields):
    assert ask(server, **fields).json()["choices"] == ask(server).json()["choices"]


def test_schema_on_the_command_line(tiny_llama, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")

    def generate(schema):
        return subprocess.run([sys.executable, "-m", "gptq_belle.cli", "generate", str(tiny_llama), "--prompt", "你好",
                               "--json-schema", str(schema), "--max-tokens", "150", "--device", "cpu"],
                              capture_output=True, text=True, timeout=200)

    assert follows_schema(generate(path).stdout)
    path.write_text("[1]", encoding="utf-8")
    assert generate(path).returncode == 4
