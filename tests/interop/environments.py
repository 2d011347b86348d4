"""Environments of the peers' own, made from pinned requirements where they are missing, and their processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAMED = "GPTQ_BELLE_PEER_{}"  # an environment variable: the interpreter of an environment that exists


def python_of(name: str, where: Path = HERE, with_torch: bool = True) -> str:
    """The interpreter of the environment for NAME.txt in a folder of tests; skips the test, with pip's reason, if it
    has none.

    Torch is installed first, with what it needs, in the version of constraints.txt; all else is pinned. Without torch,
    only the packages in the file are pinned, not what they need.
    """
    if given := os.environ.get(NAMED.format(name.upper())):
        return given
    folder, wanted = ROOT / "build" / where.name / name, where / f"{name}.txt"
    python, ready = folder / "bin" / "python", folder / "ready.txt"
    if not ready.is_file() or ready.read_text() != wanted.read_text():
        _run(name, sys.executable, "-m", "venv", "--clear", str(folder))
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        if with_torch:
            _run(name, *pip, "-c", str(ROOT / "constraints.txt"), "torch", "wheel", "setuptools")
        _run(name, *pip, *(["--no-deps"] if with_torch else []), "-r", str(wanted))
        ready.write_text(wanted.read_text())
    return str(python)


def node_folder(where: Path) -> Path:
    """The folder with the packages of package.json in a folder of tests; skips the test, with npm's reason, without."""
    folder, wanted = ROOT / "build" / where.name / "node", where / "package.json"
    ready = folder / "package.json"
    if not ready.is_file() or ready.read_text() != wanted.read_text():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed")
        folder.mkdir(parents=True, exist_ok=True)
        _run("node", "npm", "install", "--no-audit", "--no-fund", "--no-save", "--prefix", str(folder),
             *(f"{name}@{version}" for name, version in json.loads(wanted.read_text())["dependencies"].items()))
        ready.write_text(wanted.read_text())
    return folder


def _run(name: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=_clean())
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["no reason given"]
        pytest.skip(f"the environment for {name} cannot be made: {lines[-1].strip()[:300]}")


def carry_out(python: str, script: str, jobs: list[dict], scratch: Path) -> dict:
    """Run a peer's script of this folder on jobs (see jobs.py): versions, and one result a job."""
    asked, answered = scratch / f"{script}-jobs.json", scratch / f"{script}-results.json"
    asked.write_text(json.dumps(jobs))
    done = subprocess.run([python, str(HERE / f"{script}.py"), str(asked), str(answered)], capture_output=True,
                          text=True, errors="replace", cwd=scratch, env=_clean())
    assert answered.is_file(), f"{script} ended with {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(answered.read_text())


def _clean() -> dict[str, str]:
    """The environment's variables without ours: with the root on its path, a peer would find our `kernels`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST"))}
    return kept | {"HF_HUB_OFFLINE": "1"}
