"""chat in a real terminal, driven through tmux: paste, history, resize, interrupt, Chinese input; slow."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux (apt install tmux)")]
LONG = 10**5  # tokens: an answer that does not end by itself


class Terminal:
    """A tmux server with one window that runs a command."""

    def __init__(self, folder, *command):
        self.tmux = ("tmux", "-S", str(folder / "socket"), "-f", "/dev/null")
        env = os.environ | {"XDG_STATE_HOME": str(folder), "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        subprocess.run([*self.tmux, "new-session", "-d", "-x", "60", "-y", "30", *map(str, command)], check=True,
                       env=env)
        self("set-option", "-g", "remain-on-exit", "on")

    def __call__(self, *words, text=None):
        return subprocess.run([*self.tmux, *words], check=True, input=text, capture_output=True, text=True).stdout

    @property
    def screen(self):
        return self("capture-pane", "-p", "-J", "-S", "-")

    def keys(self, *names):
        self("send-keys", *names)

    def type(self, text):
        self("send-keys", "-l", text)

    def paste(self, text):
        self("load-buffer", "-", text=text)
        self("paste-buffer", "-p", "-r")

    def wait(self, *texts, seconds=60):
        until = time.monotonic() + seconds
        while not all(text in (screen := self.screen) for text in texts):
            assert time.monotonic() < until, f"no {texts} in\n{screen}"
            time.sleep(0.1)
        return screen


@pytest.fixture
def terminal(tiny_bloom, tmp_path):
    endless = shutil.copytree(tiny_bloom, tmp_path / "endless")
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps(config | {"seq_length": 10**6}))
    running = []

    def start(*options):
        running.append(Terminal(tmp_path, sys.executable, "-m", "gptq_belle.cli", "chat", endless, *options))
        running[-1].wait("/help lists commands", "\n> ")
        return running[-1]

    yield start
    for each in running:
        each("kill-server")


def saved(terminal, file):
    """The questions of the conversation."""
    terminal.type(f"/save {file}")
    terminal.keys("Enter")
    terminal.wait("saved in")
    return [message["content"] for message in json.loads(file.read_text())["messages"] if message["role"] == "user"]


def test_pasted_and_quoted_lines_are_one_message_and_history_repeats_them(terminal, tmp_path):
    screen = terminal("--max-tokens", 4)
    screen.paste("第一行\n第二行")
    screen.wait("> 第一行", "第二行")
    time.sleep(0.5)
    assert "tokens/s" not in screen.screen  # a paste is not sent by itself
    screen.keys("Enter")
    screen.wait("tokens/s")
    screen.type("三")
    screen.keys("M-Enter")
    screen.type("四")
    screen.keys("Enter")
    screen.wait("> 三\n  四")
    screen.type('"""五')
    screen.keys("Enter")
    screen.type('六"""')
    screen.keys("Enter")
    screen.wait('六"""\n')
    screen.keys("Up")
    screen.wait('> """五\n  六"""')
    screen("resize-window", "-x", "40", "-y", "20")
    screen.keys("Enter")
    assert saved(screen, tmp_path / "chat.json") == ["第一行\n第二行", "三\n四", "五\n六", "五\n六"]
    screen.keys("C-d")
    screen.wait("Pane is dead (status 0")
    assert (tmp_path / "gptq_belle" / "chat_history").stat().st_mode & 0o777 == 0o600


def test_keys_during_an_answer_are_not_shown_in_it_and_kept_for_the_prompt(terminal):
    screen = terminal("--max-tokens", LONG)
    screen.type("开始")
    screen.keys("Enter")
    time.sleep(1)
    screen.type("下一个问题")
    time.sleep(0.5)
    assert "下一个问题" not in screen.screen
    screen("resize-window", "-x", "50", "-y", "20")
    screen.keys("C-c")
    screen.wait("[stopped; ", "> 下一个问题")
    screen.keys("C-c")  # drops the line
    screen.wait("Ctrl-D exits", "\n> ")
    screen.type("/exit")
    screen.keys("Enter")
    screen.wait("Pane is dead (status 0")
