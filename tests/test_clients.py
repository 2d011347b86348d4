"""Clients that people use, each with its pinned version in an environment under build/clients, on a server process.

`make clients` runs this. What an answer says is chance: the demo model knows neither JSON nor tools.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import serving

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS / "interop"))
from environments import node_folder, python_of  # noqa: E402

ROOT, CLIENTS = TESTS.parent, TESTS / "clients"
CONTEXT = 2048  # positions; the demo model was trained on 512, which prompts of these clients exceed
PYTHON = {"openai": "openai", "litellm": "litellm", "langchain-openai": "langchain", "llama-index-llms-openai-like":
          "llama_index", "instructor": "instructor", "huggingface_hub": "hugging_face", "lm_eval": "lm_eval",
          "anthropic": "anthropic"}  # package: its module without _cases
NODE = {"openai": "openai", "ai": "ai-sdk"}  # package: its key in node_cases.mjs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo model of BLOOM, whose positions have no limit."""
    path = shutil.copytree(ROOT / "examples" / "belle_tiny" / "bloom", tmp_path_factory.mktemp("model") / "demo")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"seq_length": CONTEXT}))
    return path


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    with serving(model, tmp_path_factory.mktemp("log") / "log", "--max-batch", "4") as running:
        yield running


def outcomes(*command, model, folder):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    kept.pop("HF_HUB_OFFLINE", None)  # huggingface_hub would refuse even this machine's own address
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200,
                          env=kept | {"CLIENT_MODEL": str(model)})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("client", PYTHON)
def test_python_client(server, model, client):
    python = python_of("clients", CLIENTS, with_torch=False)
    found = outcomes(python, "runner.py", f"{PYTHON[client]}_cases", f"{server.url}/v1", model=model, folder=CLIENTS)
    assert len(found) == len(python_cases(client))
    assert set(found.values()) == {"ok"}, json.dumps(found, indent=2)


@pytest.mark.slow
def test_node_clients(server, model):
    folder = node_folder(CLIENTS)
    shutil.copy(CLIENTS / "node_cases.mjs", folder)  # packages are found from the folder of the file
    found = outcomes("node", "node_cases.mjs", f"{server.url}/v1", model=model, folder=folder)
    assert [*found] == [*NODE.values()]
    assert {outcome for cases in found.values() for outcome in cases.values()} == {"ok"}, json.dumps(found, indent=2)


def python_cases(client):
    tree = ast.parse((CLIENTS / f"{PYTHON[client]}_cases.py").read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name.removeprefix("case_") for name in names if name.startswith("case_")]


def node_cases(client):
    text = (CLIENTS / "node_cases.mjs").read_text(encoding="utf-8")
    block = re.search(rf'^  "?{NODE[client]}"?: {{\n(.*?)^  }},', text, re.DOTALL | re.MULTILINE)
    return re.findall(r"^    async (\w+)\(", block[1], re.MULTILINE)


def test_documentation_has_the_table_of_clients():
    """The table of docs/serving.md: every client, its pinned version and its cases."""
    pins = dict(line.split("==") for line in (CLIENTS / "clients.txt").read_text().split())
    packages = json.loads((CLIENTS / "package.json").read_text())["dependencies"]
    pins = {name.partition("[")[0]: version for name, version in pins.items()}
    rows = [(name, pins[name], python_cases(name)) for name in PYTHON]
    rows += [(f"{name} (Node)", packages[name], node_cases(name)) for name in NODE]
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for name, version, cases in rows:
        row = f"| {name} | {version} | {', '.join(case.replace('_', ' ') for case in cases)} |"
        assert row in text, row
