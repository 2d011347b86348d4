"""No Triton kernel accesses memory outside its tensors: `guard_pages.py` runs each on guarded memory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_triton import has_working_interpreter

pytestmark = pytest.mark.skipif(not has_working_interpreter(), reason="needs triton 3.9 or newer")


def run_on_guarded_memory(kernel, script="guard_pages.py"):
    return subprocess.run([sys.executable, script, kernel], cwd=Path(__file__).parent, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True)


@pytest.mark.parametrize("kernel", ["skinny", "epilogue", "gemm", "reduce", "arrange", "dequant", "gptq", "descent"])
def test_kernel_stays_within_its_tensors(kernel):
    run = run_on_guarded_memory(kernel)
    assert run.returncode == 0, run.stdout[-300:] + run.stderr[-6000:]
    assert run.stdout


@pytest.mark.parametrize("kernel", ["attention", "embedding", "head"])
def test_kernel_of_the_decode_step_stays_within_its_tensors(kernel):
    run = run_on_guarded_memory(kernel, "guard_decode_pages.py")
    assert run.returncode == 0, run.stdout[-300:] + run.stderr[-6000:]
    assert run.stdout


@pytest.mark.parametrize("overrun", ["overrun_after", "overrun_before"])
def test_overrun_is_noticed(overrun):
    assert run_on_guarded_memory(overrun).returncode == -signal.SIGSEGV
