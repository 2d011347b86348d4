"""Chat templates: every command formats prompts with the model's template and stops at its end-of-message tokens."""

import json
import shutil
from datetime import datetime

import pytest
from conftest import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.cli.conversation import Conversation
from gptq_belle.engine.model import load
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.errors import InputError, UsageError
from gptq_belle.evaluation.belle_answers import prompt_ids
from gptq_belle.prompts.conversation import ChatFormat
from gptq_belle.prompts.messages import merge_messages
from gptq_belle.prompts.styles import STYLES, TEMPLATE
from gptq_belle.quantization.calibration.rows import Calibration, calibration_rows
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint

PAD = 3  # a token such as <|im_end|>, which ends a message and is not eos
CHATML = ("{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]\n{{ message['content'] }}<pad>\n"
          "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}")
LLAMA2 = ("{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
          "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
          "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
          "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}")
PLAIN = ("{% for message in messages %}{% if message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
         "### Response:\n{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}")
QUESTION = {"role": "user", "content": "你好"}
ANSWER = {"role": "assistant", "content": "好。"}
SYSTEM = {"role": "system", "content": "简短。"}


def chat(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, TEMPLATE)


@pytest.fixture
def model(tiny_llama, tmp_path):
    """A model directory with a ChatML template."""
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    (path / "chat_template.jinja").write_text(CHATML)
    return path


def test_calibration_does_not_depend_on_the_day(tmp_path, monkeypatch):
    """The calibration tokens are part of a job's fingerprint: it would not resume on another day."""
    class Clock(datetime):
        day_of_test = 1

        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, cls.day_of_test)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    tokenizer = chat("{{ strftime_now('%d %b %Y') }}\n" + CHATML).tokenizer
    found, questions = [], []
    for Clock.day_of_test in (1, 2):
        found.append(calibration_rows(Calibration(rows=1, seq_len=64), tokenizer, TEMPLATE).tokens.tolist())
        questions.append(ChatFormat(tokenizer, TEMPLATE).question("你好").text.split("\n")[0])
    assert questions == ["01 May 2031", "02 May 2031"]
    assert found[0] == found[1]


@pytest.mark.parametrize("template", ["hello", "{{ % }}", "{% for message in messages %}"])
def test_templates_that_cannot_ask_are_refused(template):
    with pytest.raises(InputError) as caught:
        chat(template)
    assert "unexpected" not in str(caught.value)  # the word for faults of this program


@pytest.mark.parametrize("template", [CHATML, LLAMA2, PLAIN])
@pytest.mark.parametrize("messages", [[QUESTION], [QUESTION, ANSWER, QUESTION]])
def test_prompt_is_that_of_transformers(template, messages):
    tokenizer = chat(template).tokenizer
    prompt = chat(template).prompt(messages)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert (prompt.ids, prompt.text) == (expected, tokenizer.decode(expected))


@pytest.mark.parametrize(("template", "stops", "ids"), [
    (CHATML, (), {PAD}), (LLAMA2, (), {2}), (PLAIN, ("### Instruction:",), set()),
    (CHATML.replace("<pad>", "<|im_end|>"), ("<|im_end|>",), set()),  # not a token of this tokenizer
    ("{{ messages[-1]['content'] }}", (), set()),  # for a single question
])
def test_answers_end_where_the_template_ends_them(template, stops, ids):
    assert (chat(template).stops, chat(template).stop_ids) == (stops, ids)


def test_every_way_to_ask_uses_the_template(model, tmp_path):
    expected = chat(CHATML).prompt([QUESTION])
    out = tmp_path / "out"
    quantize_checkpoint(model, out, QuantConfig(method="rtn"))
    assert inspect(out).prompt_style == TEMPLATE
    loaded = load(out, device="cpu")
    assert loaded._encode("你好", "auto") == (expected.ids, ())
    assert prompt_ids(loaded, ["你好"]) == [expected.ids]
    assert PAD in loaded.eos_ids
    conversation = Conversation(loaded, "auto", SamplingParams(max_new_tokens=2))
    assert conversation._prompt("你好")[0] == expected.ids
    belle = loaded._encode("你好", "llama")
    assert loaded.tokenizer.decode(belle[0]) == "Human: 你好 \n\nAssistant: "


def test_calibration_uses_the_template(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"messages": [SYSTEM, QUESTION, ANSWER]}))
    tokenizer = chat(CHATML).tokenizer
    expected = tokenizer.apply_chat_template([SYSTEM, QUESTION, ANSWER], return_dict=False)
    assert calibration_rows(Calibration(data), tokenizer, TEMPLATE).tokens.tolist() == [expected]


@pytest.mark.parametrize("files", [
    {"tokenizer_config.json": [{"name": "tool_use", "template": "{{ tools }}"},
                               {"name": "default", "template": CHATML}]},
    {"tokenizer_config.json": [{"name": "only", "template": CHATML}]},
    {"tokenizer_config.json": PLAIN, "chat_template.jinja": CHATML},
    {"chat_template.jinja": CHATML, "additional_chat_templates/rag.jinja": "{{ documents }}"},
])
def test_templates_by_name_or_in_files_are_read_and_kept(tiny_llama, tmp_path, files):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    (path / "additional_chat_templates").mkdir()
    for name, content in files.items():
        file = path / name
        if file.suffix == ".json":
            content = json.dumps(json.loads(file.read_text()) | {"chat_template": content})
        file.write_text(content)
    quantize_checkpoint(path, tmp_path / "out", QuantConfig(method="rtn"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == load_tokenizer(path).chat_template
    for each in (path, tmp_path / "out"):
        assert inspect(each).problems == []
        found = load(each, device="cpu").chat_format()
        assert (found.name, found.prompt([QUESTION])) == (TEMPLATE, chat(CHATML).prompt([QUESTION]))


def test_several_templates_without_a_default_need_a_style(tiny_llama, tmp_path):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((path / "tokenizer_config.json").read_text())
    named = [{"name": name, "template": CHATML} for name in ("rag", "tool_use")]
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    with pytest.raises(InputError, match="tool_use"):
        quantize_checkpoint(path, tmp_path / "out", QuantConfig(method="rtn"))
    assert any("tool_use" in problem for problem in inspect(path).problems)
    quantize_checkpoint(path, tmp_path / "out", QuantConfig(method="rtn"), prompt_style="bloom")
    assert load(tmp_path / "out", device="cpu").prompt_style == "bloom"


# ---- messages ----


def test_messages_of_the_same_role_are_merged():
    messages = [SYSTEM, {"role": "developer", "content": "b"}, QUESTION, {"role": "user", "content": None}, QUESTION]
    assert merge_messages(messages) == [{"role": "system", "content": "简短。\nb"},
                                        {"role": "user", "content": "你好\n你好"}]
    assert chat(LLAMA2).prompt([QUESTION, QUESTION]).text == "<s>[INST] 你好\n你好 [/INST]"
    assert ChatFormat(tiny_tokenizer(), "bloom").prompt(messages).text == "Human: 简短。\nb\n你好\n你好\n\nAssistant:"


@pytest.mark.parametrize("content", [None, "", "absent"])
def test_answer_without_content_is_empty(content):
    answer = {"role": "assistant", "tool_calls": []} | ({} if content == "absent" else {"content": content})
    text = ChatFormat(tiny_tokenizer(), "bloom").prompt([QUESTION, answer, QUESTION]).text
    assert text == "Human: 你好\n\nAssistant:</s>Human: 你好\n\nAssistant:"


def test_leading_answer_is_left_to_the_template():
    assert chat(CHATML).prompt([ANSWER, QUESTION]).text == (
        "<s>[assistant]\n好。<pad>\n[user]\n你好<pad>\n[assistant]\n")
    for refusing in (chat(LLAMA2), *(ChatFormat(tiny_tokenizer(), style) for style in STYLES)):
        with pytest.raises(UsageError):
            refusing.prompt([ANSWER, QUESTION])


@pytest.mark.parametrize("messages", [
    [], [SYSTEM], [QUESTION, ANSWER], [QUESTION, SYSTEM], [{"role": "tool", "content": "1"}, QUESTION],
    [{"role": "function", "content": "1"}, QUESTION], [{"content": "x"}], [{"role": "user", "content": ["x"]}],
    [QUESTION, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, QUESTION],
])
@pytest.mark.parametrize("style", [TEMPLATE, "bloom"])
def test_messages_that_no_prompt_expresses_are_refused(messages, style):
    tokenizer = chat(CHATML).tokenizer
    with pytest.raises(UsageError):
        ChatFormat(tokenizer, style).prompt(messages)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "developer", "user", "assistant"]),
                          st.sampled_from([None, "", "a", "你好"])), max_size=7),
       st.sampled_from([*STYLES, CHATML, LLAMA2]))
def test_any_conversation_is_refused_or_keeps_every_text(messages, style):
    found = ChatFormat(tiny_tokenizer(), style) if style in STYLES else chat(style)
    messages = [{"role": role, "content": content} for role, content in messages]
    try:
        prompt = found.prompt(messages)
    except UsageError:
        return
    assert found.tokenizer.decode(prompt.ids).endswith(prompt.text)
    for text in ("a", "你好"):
        bare = prompt.text
        for word in ("assistant", "system", "Human", "Assistant", "<pad>"):
            bare = bare.replace(word, "")
        assert bare.count(text) == sum(message["content"] == text for message in messages)
