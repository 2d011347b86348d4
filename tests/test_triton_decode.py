"""The kernels of a decode step that are not products, in Triton's interpreter: runs their tests in other processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_triton import has_working_interpreter

pytestmark = pytest.mark.skipif(not has_working_interpreter(), reason="needs triton 3.9 or newer")


@pytest.mark.parametrize(("file", "marker"), [
    ("attention_interpreted.py", "not slow"), ("step_ends_interpreted.py", "not slow"),
    ("sampling_interpreted.py", "not slow"),
    *(pytest.param(file, "slow", marks=pytest.mark.slow) for file in (
        "attention_interpreted.py", "step_ends_interpreted.py", "skinny_interpreted.py"))])
def test_kernels_of_a_decode_step_in_the_interpreter(file, marker):
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file, "-m", marker],
                         cwd=Path(__file__).parent, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
