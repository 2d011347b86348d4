"""Times of a product by one plan or another, on the device; needs Triton and a GPU when it is called."""

from collections.abc import Sequence

import torch

from gptq_belle.errors import GptqBelleError
from gptq_belle.kernels import triton_matmul
from gptq_belle.kernels.triton_config import Case, Plan
from gptq_belle.kernels.triton_layout import SlicedWeight
from gptq_belle.measure import cuda
from gptq_belle.measure.tuning import Timer

EXPANDED = Plan("expand", None)
# Relative error of the whole result against the expanded weight, which rounds it to x's dtype as many rows do.
AGREEMENT = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


def device_timer(case: Case, weights: Sequence[SlicedWeight]) -> Timer:
    """Times plans of a case on the device, its weights taking turns; wrong results are an error, not a time."""
    from triton.runtime.errors import OutOfResources, PTXASError

    turns = rotation(weights)
    dtype: torch.dtype = getattr(torch, case.dtype)
    x = torch.randn(case.rows, turns[0].in_features, device=turns[0].words.device).to(dtype)
    expected = triton_matmul.quant_matmul(x, turns[0], by=EXPANDED).float()

    def time(plan: Plan) -> float:
        try:
            y = triton_matmul.quant_matmul(x, turns[0], by=plan).float()
            error = float((y - expected).norm() / expected.norm())
            if not error < AGREEMENT[dtype]:
                raise GptqBelleError(f"{plan} multiplies wrongly here: relative error {error:.1e}, {describe(case)}",
                                     "Please report it, with the output of `gptq-belle doctor --json`.")
            actions = [lambda weight=weight: triton_matmul.quant_matmul(x, weight, by=plan) for weight in turns]
            return cuda.device_seconds(actions).median
        except (OutOfResources, PTXASError):  # too many stages for this part's shared memory, too many registers
            return float("inf")

    return time


def rotation(weights: Sequence[SlicedWeight]) -> list[SlicedWeight]:
    """So many weights of one shape, copied where they are too few, that none stays in the L2 cache."""
    first = weights[0]
    wanted = cuda.copies(first.words.nbytes + first.scales.nbytes, first.words.device)
    turns = list(weights[:wanted])
    turns += [first._replace(words=first.words.clone(), scales=first.scales.clone())
              for _ in range(wanted - len(turns))]
    return turns


def describe(case: Case) -> str:
    """A case in words."""
    return f"{case.rows} rows, {case.inputs} x {case.outputs}, {case.bits} bits, runs of {case.run}, {case.dtype}"
