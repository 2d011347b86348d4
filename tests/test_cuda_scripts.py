"""The GPU benchmarks without a GPU: in Triton's interpreter (`cuda_scripts_interpreted.py`), and their exit code."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_gpu_scripts_run_in_the_triton_interpreter():
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "cuda_scripts_interpreted.py"],
                         cwd=TESTS, env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_exits_3(tmp_path):
    run = subprocess.run([ROOT / "benchmarks" / "gpu_check.sh", tmp_path / "out"], capture_output=True, text=True,
                         env=os.environ | {"PYTHON": sys.executable})
    assert run.returncode == 3
    assert "GPU" in run.stderr
