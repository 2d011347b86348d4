"""Whole decode steps of fused launches: `fused_step_interpreted.py` runs in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_triton import has_working_interpreter

pytestmark = pytest.mark.skipif(not has_working_interpreter(), reason="needs triton 3.9 or newer")


def run_interpreted(marker: str) -> None:
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marker,
                          "fused_step_interpreted.py"], cwd=Path(__file__).parent, text=True, capture_output=True,
                         env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_fused_steps_in_the_interpreter():
    run_interpreted("not slow")


@pytest.mark.slow
def test_fused_steps_of_the_demo_models_in_the_interpreter():
    run_interpreted("slow")
