"""Threads of torch that wait give up their core, unless the user decides otherwise."""

import os
import subprocess
import sys

import pytest

from gptq_belle.common.openmp import SPIN_COUNT, SPINS, USERS_CHOICE

CODE = """
import os
from gptq_belle.common.openmp import spinning_note
print(os.environ.get("GOMP_SPINCOUNT"), spinning_note())
"""


def spins(first="import gptq_belle", **choice):
    """GOMP_SPINCOUNT in a new process and what doctor says of it."""
    environment = {name: value for name, value in os.environ.items() if name not in USERS_CHOICE} | choice
    run = subprocess.run([sys.executable, "-c", f"{first}\n{CODE}"], env=environment, check=True, capture_output=True,
                         text=True)
    return run.stdout.strip().split(" ", 1)


def test_importing_the_package_limits_spinning():
    assert spins() == [str(SPINS), "None"]


@pytest.mark.parametrize("choice", [{SPIN_COUNT: "7"}, {"OMP_WAIT_POLICY": "active"}], ids=("spins", "policy"))
def test_the_users_choice_stays(choice):
    assert spins(**choice) == [choice.get(SPIN_COUNT, "None"), "None"]


def test_a_torch_that_is_already_loaded_is_reported():
    count, note = spins("import torch")
    assert count == "None"
    assert f"{SPIN_COUNT}={SPINS}" in note
