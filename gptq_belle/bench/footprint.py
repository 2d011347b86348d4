"""Load time and peak memory of one model, measured in a new process that does nothing else.

The process runs ``python -m gptq_belle.bench.footprint '{"path": ..., ...}'`` and prints one line of JSON.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gptq_belle.common.devices import resolve_device
from gptq_belle.common.memory import PeakMemory, anonymous_bytes, release_unused
from gptq_belle.errors import GptqBelleError, HardwareError, InputError

STEPS = 4  # decode steps; the first already reaches the peak


@dataclass(frozen=True, slots=True)
class Footprint:
    """Load time and memory of one model. Sizes of anonymous memory are None if the system does not report them."""

    load_seconds: float  # time of `gptq_belle.load`, without importing the libraries
    loaded_bytes: int | None  # anonymous memory after loading, minus that of the process before loading
    peak_bytes: int | None  # peak over loading, prefill and decoding, minus that of the process before loading
    process_bytes: int | None  # peak of the whole process, libraries included
    cuda_bytes: int | None  # peak of torch's allocations on the device; None without CUDA


def measure_in_new_process(path: str | Path, *, device: str = "auto", precision: str | None = None,
                           head_bits: int | None = None, cache: str = "float16", prompt: int = 16,
                           batch: int = 1) -> Footprint:
    """Measure a model in a new process.

    Args:
        path: the model directory.
        device, precision, head_bits, cache: as for `gptq_belle.load`.
        prompt, batch: tokens and number of the prefilled prompts.
    Raises:
        InputError: the process failed; the message contains its last line.
        HardwareError: the process was killed, most likely because memory ran out.
    """
    request = {"path": str(path), "device": device, "precision": precision, "head_bits": head_bits, "cache": cache,
               "prompt": prompt, "batch": batch, "threads": torch.get_num_threads()}
    done = subprocess.run([sys.executable, "-m", "gptq_belle.bench.footprint", json.dumps(request)],
                          capture_output=True, text=True)
    if done.returncode < 0:
        raise HardwareError(f"measuring {path} was stopped by signal {-done.returncode}",
                            "Most likely memory ran out: close other programs, or choose fewer bits.")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{path} could not be measured: {reason}", "Try `gptq-belle inspect` on it.")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def measure(path: str, device: str, precision: str | None, head_bits: int | None, cache: str, prompt: int,
            batch: int) -> Footprint:
    """Measure in this process, which should have done nothing else; arguments as of `measure_in_new_process`."""
    from gptq_belle.engine.model import load

    release_unused()
    target = resolve_device(device)
    with PeakMemory(device=target if target.type == "cuda" else None) as peak:
        start_time = time.perf_counter()
        model = load(path, device=device, precision=precision, head_bits=head_bits, cache=cache)
        load_seconds = time.perf_counter() - start_time
        loaded = anonymous_bytes()
        logits, session = model.prefill(torch.ones(batch, prompt, dtype=torch.int64))
        for _ in range(STEPS):
            logits = model.decode(logits.argmax(-1), session)
    before = peak.start or 0
    return Footprint(
        load_seconds=load_seconds,
        loaded_bytes=None if loaded is None else loaded - before,
        peak_bytes=None if peak.bytes is None else peak.bytes - before,
        process_bytes=peak.bytes,
        cuda_bytes=peak.cuda_bytes,
    )


def main() -> None:
    """Measure the model of the request on the command line."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request.pop("threads"))
    try:
        print(json.dumps(asdict(measure(**request))))
    except GptqBelleError as error:
        sys.exit(error.cause)


if __name__ == "__main__":
    main()
