"""How long the OpenMP threads of torch spin while they wait for work. Imports no torch."""

import os
import sys

SPIN_COUNT = "GOMP_SPINCOUNT"  # environment variable of GNU OpenMP, which torch's wheels for Linux contain
USERS_CHOICE = (SPIN_COUNT, "OMP_WAIT_POLICY")
SPINS = 1000  # the default is 300,000; measured by benchmarks/bench_busy.py


def limit_spinning() -> None:
    """Set the number of spins for this process and its children, unless the user has set it or torch, which reads it
    once, is loaded."""
    if "torch" not in sys.modules and not any(name in os.environ for name in USERS_CHOICE):
        os.environ[SPIN_COUNT] = str(SPINS)


def spinning_note() -> str | None:
    """What to do if torch was loaded before the number could be set; None if a number or policy is set."""
    if any(name in os.environ for name in USERS_CHOICE):
        return None
    return (f"torch was imported before gptq_belle, so its threads spin while they wait: if other processes need the "
            f"cores, import gptq_belle first or set {SPIN_COUNT}={SPINS}")
