"""The unpacking assembly: runs `unpack_interpreted.py` in a separate process."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_unpacking():
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "unpack_interpreted.py"],
                         cwd=Path(__file__).parent, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
