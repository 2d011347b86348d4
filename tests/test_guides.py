"""docs/guides: both languages show the same commands, which exist, and run on the demo model (slow)."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import typer.main

from gptq_belle.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted(path for path in (ROOT / "docs" / "guides").glob("*.md") if not path.stem.endswith("_zh"))
EXAMPLES, BUILTIN = ROOT / "examples" / "belle_tiny", ROOT / "gptq_belle" / "data" / "builtin.jsonl"
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)  # those of bash and python run here
PROGRAM = f"{shlex.quote(sys.executable)} -m gptq_belle.cli"
READY = 180  # seconds until a server answers


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and content of every code block; comments may be translated."""
    return [(language, re.sub(r"  #.*", "", content)) for language, content in BLOCK.findall(path.read_text("utf-8"))]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_both_languages_show_the_same_commands(guide):
    assert blocks(guide) == blocks(guide.with_stem(f"{guide.stem}_zh"))
    assert any(language == "bash" for language, _ in blocks(guide))


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.stem)
def test_commands_and_options_exist(path):
    lines = [line for _, content in blocks(path) for line in content.splitlines() if line.startswith("gptq-belle ")]
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        command = typer.main.get_command(app)
        while words and hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= known, line


@pytest.mark.parametrize("path", [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("README*.md")], ids=lambda path: path.name)
def test_linked_files_exist(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A quantized demo model in the format of AutoGPTQ."""
    out = tmp_path_factory.mktemp("quantized") / "model"
    subprocess.run([sys.executable, "-m", "gptq_belle.cli", "quantize", EXAMPLES / "bloom", out, "--method", "rtn"],
                   cwd=ROOT, check=True)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_commands_run_on_the_demo_model(guide, quantized, tmp_path):
    (tmp_path / "my-model").symlink_to(EXAMPLES / "bloom")
    (tmp_path / "autogptq-model").symlink_to(quantized)
    if guide.stem != "quantize":
        (tmp_path / "my-model-4bit").symlink_to(quantized)
    shutil.copy(BUILTIN, tmp_path / "my-data.jsonl")
    shutil.copy(EXAMPLES / "data" / "heldout.jsonl", tmp_path / "held-out.jsonl")
    shutil.copy(EXAMPLES / "data" / "test.jsonl", tmp_path / "questions.jsonl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    servers: list[subprocess.Popen] = []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
    try:
        for language, content in BLOCK.findall(guide.read_text("utf-8")):
            if language == "python":
                subprocess.run([sys.executable, "-c", content], cwd=tmp_path, check=True, env=environment)
            for line in content.splitlines() if language == "bash" else ():
                words = re.sub("^gptq-belle", PROGRAM, line).replace(":8000", f":{port}")
                if line.startswith("gptq-belle serve"):
                    servers.append(subprocess.Popen(shlex.split(f"{words} --port {port}"), cwd=tmp_path,
                                                    env=environment))
                    wait_for(f"http://127.0.0.1:{port}/health", servers[-1])
                else:
                    subprocess.run(["bash", "-c", words], cwd=tmp_path, check=True, env=environment)
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + READY
    while time.monotonic() < deadline:
        assert server.poll() is None
        try:
            httpx.get(url, trust_env=False).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise AssertionError(f"no answer after {READY} s")
