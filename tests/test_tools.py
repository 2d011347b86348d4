"""Tools: the prompts that describe them, the grammar of calls, and calls by HTTP, whole and streamed."""

import json
from pathlib import Path

import httpx
import pytest
from conftest import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from server_process import serving

from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.token_constraint import ConstraintCompiler, call_grammar
from gptq_belle.errors import UsageError
from gptq_belle.prompts.conversation import ChatFormat
from gptq_belle.prompts.styles import STYLES, TEMPLATE
from gptq_belle.prompts.tool_calls import PLAIN_FORM, CallForm
from gptq_belle.serving.call_stream import CallStream
from gptq_belle.serving.completion_choice import TextDelta

DEMO = Path(__file__).resolve().parent.parent / "examples" / "belle_tiny" / "bloom"
CITY = {"type": "object", "properties": {"城市": {"enum": ["北京", "上海"]}}, "required": ["城市"],
        "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": CITY}},
         {"type": "function", "function": {"name": "now"}}]
QUESTION = {"role": "user", "content": "你好"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"城市": "北京"}'}}
CALLED = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]},
          {"role": "tool", "tool_call_id": "call_1", "content": "晴"}]
# A template that writes calls as the models of Qwen 2.5 do.
HERMES = ("{% if tools %}{{ '[system]\n' }}{% for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}"
          "{{ '<pad>\n' }}{% endif %}{% for message in messages %}{{ '[' + message.role + ']' }}"
          "{% if message.content %}{{ '\n' + message.content }}{% endif %}"
          "{% for call in message.tool_calls or [] %}{{ '\n<call>\n{\"name\": \"' + call.function.name + '\", ' }}"
          "{{ '\"arguments\": ' + (call.function.arguments | tojson) + '}\n</call>' }}{% endfor %}{{ '<pad>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}")


def chat(style):
    tokenizer = tiny_tokenizer()
    if style not in STYLES:
        tokenizer.chat_template, style = style, TEMPLATE
    return ChatFormat(tokenizer, style)


def test_template_that_writes_calls_is_used_and_its_form_is_found():
    found = chat(HERMES)
    assert found.call_form == CallForm('<call>\n{"name": "', '", "arguments": ', "}\n</call>")
    assert found.call_form.trigger == "<call>"
    assert found.prompt(CALLED, tools=TOOLS).text == (
        f"[system]\n{json.dumps(TOOLS[0], ensure_ascii=False)}\n{json.dumps(TOOLS[1])}\n<pad>\n[user]\n你好<pad>\n"
        '[assistant]\n<call>\n{"name": "weather", "arguments": {"城市": "北京"}}\n</call><pad>\n[tool]\n晴<pad>\n'
        "[assistant]\n")


@pytest.mark.parametrize(("old", "new"), [
    ("tools", "things"), ("<call>", "<unk>"), ("| tojson", "| length | string"), ("call.function.name", "call.name")])
def test_template_without_calls_that_can_be_read_gets_tools_as_text(old, new):
    found = chat(HERMES.replace(old, new))
    assert found.call_form == PLAIN_FORM.call
    text = found.prompt(CALLED, tools=TOOLS).text
    assert text.count(found.call_form.write("weather", '{"城市": "北京"}')) == 1
    assert "天气" in text
    assert "晴" in text


@pytest.mark.parametrize("style", STYLES)
def test_first_question_describes_tools_and_results_are_questions(style):
    found, frame = chat(style), STYLES[style]
    described = PLAIN_FORM.tools % "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in TOOLS)
    assert found.prompt([{"role": "system", "content": "短。"}, *CALLED], tools=TOOLS).text == (
        f"{frame.before}短。\n{described}\n你好{frame.after}"
        '<tool_call>{"name": "weather", "arguments": {"城市": "北京"}}</tool_call></s>'
        f"{frame.before}工具 weather 的结果：\n晴{frame.after}")
    assert found.prompt([QUESTION]).text == f"{frame.before}你好{frame.after}"


@pytest.mark.parametrize("messages", [
    [QUESTION, CALLED[2]], [*CALLED[:2], CALLED[2] | {"tool_call_id": "call_2"}], CALLED[:2],
    [QUESTION, {"role": "assistant", "tool_calls": [{"id": "x"}]}, QUESTION]])
@pytest.mark.parametrize("style", ["bloom", HERMES])
def test_result_without_its_call_and_call_without_its_name_are_refused(messages, style):
    with pytest.raises(UsageError):
        chat(style).prompt(messages, tools=TOOLS)


def test_arguments_of_a_template_must_be_an_object():
    broken = CALL | {"function": {"name": "weather", "arguments": '{"城市'}}
    with pytest.raises(UsageError, match="JSON"):
        chat(HERMES).prompt([QUESTION, {"role": "assistant", "tool_calls": [broken]}, *CALLED[2:]])


def parts_of(pieces, form):
    """Text and call of an answer that arrives in pieces, and whether the call is complete."""
    stream, total = CallStream(form), TextDelta()
    for piece in pieces:
        total.add(TextDelta(*[(found := stream.feed(piece))[0]], call=found[1]))
    last = stream.finish("")
    total.add(TextDelta(last[0], call=last[1]))
    call = None if total.call is None else (total.call.name, total.call.arguments)
    return total.text, call, stream.is_complete


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([PLAIN_FORM.call, CallForm('<call>\n{"name": "', '", "arguments": ', "}\n</call>"),
                        CallForm("[", "]", "")]), st.sampled_from(["", "a <tool_ca", "<"]), st.data())
def test_calls_are_found_in_pieces_of_any_length(form, before, data):
    whole = before + form.write("weather", '{"a": {"b": "}</tool_call"}}')
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert parts_of(pieces, form) == (before, ("weather", '{"a": {"b": "}</tool_call"}}'), True)
    assert parts_of(list(before), form) == (before, None, False)


def test_call_that_is_cut_off_is_not_complete():
    form = PLAIN_FORM.call
    assert parts_of(["x", form.before, "wea"], form) == ("x", None, False)
    assert parts_of([form.before, "now", form.between, '{"a'], form) == ("", ("now", '{"a'), False)


@pytest.mark.parametrize(("required", "text", "follows"), [
    (False, "随便", True), (False, "a<tool_call>", False), (True, "随便", False),
    *((required, PLAIN_FORM.call.write(*call), follows) for required in (False, True) for call, follows in (
        (("weather", '{"城市": "北京"}'), True), (("now", "{}"), True), (("now", '{"a": 1}'), False),
        (("weather", '{"城市": "伦敦"}'), False), (("other", "{}"), False)))])
@pytest.mark.parametrize("before", ["", "好。"])
def test_grammar_contains_text_and_calls_that_follow_their_schema(required, text, follows, before):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    tokenizer = tiny_tokenizer()
    grammar = call_grammar(PLAIN_FORM.call, TOOLS, required)
    constraint = ConstraintCompiler(tokenizer, len(tokenizer), [2])(SamplingParams(grammar=grammar))
    for token in [*tokenizer(before + text)["input_ids"], 2]:
        assert constraint.advance() is None
        if constraint.excluded()[token]:
            assert not follows or (required and before)
            return
        constraint.accept(token)
    assert follows
    assert not (required and before)


# ---- by HTTP ----


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    with serving(DEMO, tmp_path_factory.mktemp("log") / "log", "--max-batch", "4") as running:
        yield running


def ask(server, **fields):
    body = {"messages": [QUESTION], "tools": TOOLS, "temperature": 1.0, "seed": 3, "max_tokens": 120} | fields
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def streamed(server, **fields):
    """Deltas and finish reason of a streamed answer."""
    events = [json.loads(line[6:])["choices"][0] for line in ask(server, stream=True, **fields).text.splitlines()
              if line.startswith("data: {")]
    return [event["delta"] for event in events], events[-1]["finish_reason"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_call_follows_its_schema_whole_and_streamed(server, choice):
    for seed in range(3):
        choices = ask(server, tool_choice=choice, seed=seed, n=2).json()["choices"]
        for found in choices:
            (call,) = found["message"]["tool_calls"]
            assert (found["finish_reason"], found["message"]["content"]) == ("tool_calls", None)
            assert call["function"]["name"] in (["weather", "now"] if choice == "required" else ["weather"])
            arguments = json.loads(call["function"]["arguments"])
            assert arguments.get("城市", "") in (["北京", "上海"] if call["function"]["name"] == "weather" else [""])
        deltas, reason = streamed(server, tool_choice=choice, seed=seed)
        parts = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert (reason, {part["index"] for part in parts}) == ("tool_calls", {0})
        assert not any(delta.get("content") for delta in deltas)
        assert [part["function"].get("name") for part in parts[1:]] == [None] * (len(parts) - 1)
        assert parts[0]["id"].startswith("call_")
        assert "".join(part["function"]["arguments"] for part in parts) == (
            choices[0]["message"]["tool_calls"][0]["function"]["arguments"])


def test_text_and_history_with_tools(server):
    whole = ask(server, messages=[*CALLED, QUESTION], stop=["\n"]).json()["choices"][0]
    assert "tool_calls" not in whole["message"]
    assert whole["finish_reason"] in ("stop", "length")
    assert "\n" not in whole["message"]["content"]
    deltas, _ = streamed(server, messages=[*CALLED, QUESTION], stop=["\n"])
    assert "".join(delta.get("content", "") for delta in deltas) == whole["message"]["content"]


def test_no_tools_are_described_with_tool_choice_none(server):
    assert ask(server, tool_choice="none").json()["choices"] == ask(server, tools=None).json()["choices"]


def test_call_beyond_the_limit_is_reported(server):
    found = ask(server, tool_choice="required", max_tokens=15, logprobs=True).json()["choices"][0]
    assert found["finish_reason"] == "length"
    assert len(found["logprobs"]["content"]) == 15


@pytest.mark.parametrize(("fields", "param"), [
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice"), ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"), ({"response_format": {"type": "json_object"}},
                                                           "response_format"),
    ({"tools": [TOOLS[1], {"type": "function", "function": {"name": "f", "parameters": {"type": "wat"}}}]},
     "tools.1.function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "tools.0.function.x"),
    ({"messages": CALLED[:1] + CALLED[2:]}, "messages"), ({"messages": CALLED[:2]}, "messages"),
    ({"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.1.tool_calls.0.function")])
def test_tools_that_cannot_be_called_are_refused_by_name(server, fields, param):
    response = ask(server, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_missing_package_is_named(tmp_path):
    program = ("-c", "import sys; sys.modules['llguidance'] = None; from gptq_belle.cli import main; main()")
    with serving(DEMO, tmp_path / "log", program=program) as server:
        for fields in ({}, {"tools": None, "guided_regex": "a"}):
            response = ask(server, **fields)
            assert response.status_code == 400
            assert "gptq-belle[structured]" in response.json()["error"]["message"]
        assert ask(server, tool_choice="none").status_code == 200
