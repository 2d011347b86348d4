"""chat on a pseudo-terminal and with piped lines."""

import copy
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

from gptq_belle import load
from gptq_belle.cli.chat_loop import Chat, chat_loop
from gptq_belle.cli.conversation import Conversation
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.errors import UsageError
from gptq_belle.prompts.conversation import ChatFormat
from gptq_belle.prompts.styles import Turn


class Scripted:
    """A substitute for a model that answers from a list and records its prompts."""

    def __init__(self, model, answers, context=None, pause=None):
        self.tokenizer, self.chat_format, self.path = model.tokenizer, model.chat_format, model.path
        self.answers, self.context, self.pause, self.prompts, self.rooms = iter(answers), context, pause, [], []

    def tokens(self, ids, count, params):
        self.prompts.append(self.tokenizer.decode(ids))
        self.rooms.append(count)
        for place, token in enumerate(self.tokenizer(next(self.answers))["input_ids"][:count]):
            if place == self.pause:
                raise KeyboardInterrupt
            yield token


@pytest.fixture(scope="module")
def model(tiny_bloom):
    return load(tiny_bloom, device="cpu")


def conversation_with(model, **params):
    return Conversation(model, "auto", SamplingParams(**params))


def run(conversation, *lines):
    out = io.StringIO()
    return chat_loop(conversation, out, io.StringIO("".join(f"{line}\n" for line in lines))), out.getvalue()


def test_turns_are_concatenated_with_eos(model):
    scripted = Scripted(model, ["你好。", "二"])
    conversation = conversation_with(scripted)
    turns, shown = run(conversation, "你是谁?", "", "一加一?")
    assert shown == "你好。\n二\n"
    assert [(one.question, one.answer) for one in turns] == [("你是谁?", "你好。"), ("一加一?", "二")]
    assert scripted.prompts[1] == "Human: 你是谁?\n\nAssistant:你好。</s>Human: 一加一?\n\nAssistant:"
    assert turns[1].tokens == len(model.tokenizer("二")["input_ids"])


def test_reset_exit_and_unknown_commands(model, capsys):
    scripted = Scripted(model, ["a", "b", "c"])
    turns, shown = run(conversation_with(scripted), "one", "/reset", "two", "/nonsense", "/help", "/exit", "three")
    assert shown == "a\nb\n"
    assert scripted.prompts[1] == "Human: two\n\nAssistant:"
    shown = capsys.readouterr().err
    assert "/nonsense" in shown
    assert shown.count("/help") >= 2  # in the list of commands, after the unknown one and on demand


def test_interrupt_stops_the_answer_and_keeps_its_text(model, capsys):
    conversation = conversation_with(Scripted(model, ["!?!?!?", "x"], pause=3))
    turns, shown = run(conversation, "one", "two")
    assert turns[0].stopped
    assert shown == "!?!\nx\n"
    assert conversation.turns == [Turn("one", "!?!"), Turn("two", "x")]
    assert capsys.readouterr().err.strip()


def test_question_beyond_the_context_is_rejected_and_dropped(model, capsys):
    conversation = conversation_with(Scripted(model, ["x"], context=40))
    turns, shown = run(conversation, "字" * 100, "b")
    assert shown == "x\n"
    assert conversation.turns == [Turn("b", "x")]
    assert [turn.question for turn in turns] == ["b"]
    assert "40" in capsys.readouterr().err


def test_oldest_turns_are_dropped_when_the_context_is_full(model):
    scripted = Scripted(model, ["a"] * 20, context=120)
    conversation = conversation_with(scripted, max_new_tokens=20)
    run(conversation, *(f"question number {i}" for i in range(12)))
    assert 1 <= len(conversation.turns) < 12
    assert conversation.turns[-1].question == "question number 11"
    assert all(len(model.tokenizer(prompt)["input_ids"]) <= 100 for prompt in scripted.prompts)
    assert set(scripted.rooms) == {20}


def test_next_question_of_the_model_is_not_shown(model):
    turns, shown = run(conversation_with(Scripted(model, ["好的。\n\nHuman: 再来一个\n\nAssistant: 不"])), "一")
    assert shown == "好的。\n"
    assert turns[0].answer == "好的。"


def test_prompt_style_option_is_resolved(model):
    assert conversation_with(model).format.name == "bloom"
    with pytest.raises(UsageError, match="alpaca"):
        Conversation(model, "alpaca", SamplingParams())


def test_a_real_model_runs_several_turns(model):
    turns, shown = run(conversation_with(model, max_new_tokens=6), "你好", "再见")
    assert [one.tokens <= 6 for one in turns] == [True, True]
    assert "Human:" not in shown


def test_lines_between_quotes_are_one_message(model):
    scripted = Scripted(model, ["a", "b", "c"])
    turns, _ = run(conversation_with(scripted), '"""', "一", "", "二", '"""', '"""三"""', '"""四', "五")
    assert [turn.question for turn in turns] == ["一\n\n二", "三", "四\n五"]


def test_piped_message_that_is_not_utf8_is_refused(belle, tiny_bloom, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode("gbk")), encoding="utf-8"))
    code, out, err = belle("chat", tiny_bloom, "--device", "cpu")
    assert (code, out) == (4, "")
    assert "UTF-8" in err


def test_saved_conversation_is_loaded_with_its_system_prompt(model, tmp_path, capsys):
    file, other = tmp_path / "chat.json", tmp_path / "notes.json"
    other.write_text("[]")
    run(conversation_with(Scripted(model, ["好", "的"])), "/system 用一个字回答", "一", "二", f"/save {file}",
        f"/save {other}", f"/save {file}")
    assert other.read_text() == "[]"
    scripted = Scripted(model, ["c"])
    run(conversation_with(scripted), f"/load {tmp_path / 'none'}", f"/load {other}", f"/load {file}", "三")
    assert scripted.prompts[0].replace("</s>", "|") == (
        "Human: 用一个字回答\n一\n\nAssistant:好|Human: 二\n\nAssistant:的|Human: 三\n\nAssistant:")
    shown = capsys.readouterr().err
    assert str(tmp_path / "none") in shown
    assert shown.count(str(other)) == 2


def test_regenerated_answer_replaces_the_last_one(model):
    conversation = conversation_with(Scripted(model, ["a", "b", "c"]))
    turns, shown = run(conversation, "/regen", "一", "二", "/regen")
    assert shown == "a\nb\nc\n"
    assert conversation.turns == [Turn("一", "a"), Turn("二", "c")]


def test_interrupted_regeneration_keeps_the_old_answer(model):
    scripted = Scripted(model, ["a"])
    conversation = conversation_with(scripted)
    run(conversation, "一")
    scripted.answers, scripted.pause = iter(["b"]), 0
    run(conversation, "/regen")
    assert conversation.turns == [Turn("一", "a")]


def test_template_that_ignores_the_system_prompt_refuses_it(model, capsys):
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}<{{ m['content'] }}>{% endfor %}"
    scripted = Scripted(model, ["a"])
    scripted.tokenizer, scripted.chat_format = tokenizer, lambda style: ChatFormat(tokenizer, "template")
    conversation = conversation_with(scripted)
    run(conversation, "/system 简短", "一")
    assert conversation.system == ""
    assert "template" in capsys.readouterr().err


def test_control_characters_of_a_model_do_not_reach_the_terminal(model):
    for interactive, expected in ((True, "\ufffd[31mred\tx\n"), (False, "\x1b[31mred\tx\n")):
        out = io.StringIO()
        Chat(conversation_with(Scripted(model, ["\x1b[31mred\tx"])), out, interactive).handle("一")
        assert out.getvalue() == expected


class Keyboard:
    """The command line on a pseudo-terminal."""

    def __init__(self, *args, **more):
        self.master, slave = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptq_belle.cli", *map(str, args)], stdin=slave, stdout=slave, stderr=slave,
            env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"} | more, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0))
        os.close(slave)

    def type(self, text):
        os.write(self.master, text.encode())

    def wait(self, pattern, seconds=30):
        """Read until the pattern appears; return the text up to its end."""
        until = time.monotonic() + seconds
        while (found := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < until, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
                except OSError:
                    pytest.fail(f"the process exited with {self.process.wait()}: {self.seen!r}")
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def exit_code(self):
        code = self.process.wait(20)
        os.close(self.master)
        return code


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a controlling terminal")
def test_chat_on_a_pseudo_terminal(tiny_bloom, tmp_path):
    endless = shutil.copytree(tiny_bloom, tmp_path / "endless")  # with 256 tokens the answer would end too early
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps(config | {"seq_length": 10**6}))
    screen = Keyboard("chat", endless, "--max-tokens", 10**5, "--device", "cpu",
                      XDG_STATE_HOME=str(tmp_path))
    try:
        assert "/help" in screen.wait("> ")
        screen.type("hello\n")
        screen.wait("hello\r+\n")
        time.sleep(1)
        screen.type("\x03")
        assert "Human:" not in screen.wait(r"\[stopped; [\d,]+ tokens, .* tokens/s\]")
        screen.type("/reset\n")
        screen.wait("cleared")
        screen.wait("> ")
        time.sleep(0.5)  # readline loses a signal that arrives before it waits for keys
        screen.type("\x03")
        screen.wait("Ctrl-D exits")
        screen.wait("> ")
        screen.type("\x04")
        assert screen.exit_code() == 0
    finally:
        screen.process.kill()


def test_json_prints_all_turns_at_the_end(tiny_bloom):
    done = subprocess.run(
        [sys.executable, "-m", "gptq_belle.cli", "chat", str(tiny_bloom), "--json", "--max-tokens", "4"],
        input="你好\n/exit\n", capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    turns = json.loads(done.stdout)["turns"]
    assert [turn["question"] for turn in turns] == ["你好"]
    assert turns[0]["answer"].strip() in done.stderr
