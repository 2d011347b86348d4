"""The decode attention on a GPU: runs `attention_interpreted.py` in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_triton import has_working_interpreter

pytestmark = pytest.mark.skipif(not has_working_interpreter(), reason="needs triton 3.9 or newer")


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_decode_attention_in_the_interpreter(marker):
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "attention_interpreted.py", "-m",
                          marker], cwd=Path(__file__).parent, env=os.environ | {"TRITON_INTERPRET": "1"},
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
