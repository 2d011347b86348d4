"""Load time and peak memory of one model, measured in a process of its own so that figures do not mix.

``python -m gptq_belle.bench.footprint '{"path": ..., ...}'`` is the other side of `fresh`: it prints one line of JSON.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gptq_belle.common.memory import PeakMemory, anonymous_bytes, release_unused
from gptq_belle.errors import GptqBelleError, HardwareError, InputError

STEPS = 4  # tokens decoded; the peak is reached by the first


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one model takes.

    Attributes:
        load_seconds: time of `gptq_belle.load`; the libraries are imported before.
        loaded_bytes: anonymous memory behind loading, above that of the process with the libraries alone.
        peak_bytes: the peak over loading, reading a prompt and some tokens, likewise; None (all three) where the
            system does not tell.
        process_bytes: the peak of the whole process, libraries included.
        cuda_bytes: peak of torch's allocations on the device; None without CUDA.
    """

    load_seconds: float
    loaded_bytes: int | None
    peak_bytes: int | None
    process_bytes: int | None
    cuda_bytes: int | None


def fresh(path: str | Path, *, device: str = "auto", precision: str | None = None, head_bits: int | None = None,
          cache: str = "float16", prompt: int = 16, batch: int = 1) -> Footprint:
    """Measure in a new process.

    Args:
        path: the model directory.
        device, precision, head_bits, cache: as for `gptq_belle.load`.
        prompt, batch: shape of the prompt that is read.
    Raises:
        InputError: the process failed; its last line is given.
        HardwareError: it was killed, as the system does when memory runs out.
    """
    request = {"path": str(path), "device": device, "precision": precision, "head_bits": head_bits, "cache": cache,
               "prompt": prompt, "batch": batch, "threads": torch.get_num_threads()}
    done = subprocess.run([sys.executable, "-m", "gptq_belle.bench.footprint", json.dumps(request)],
                          capture_output=True, text=True)
    if done.returncode < 0:
        raise HardwareError(f"measuring {path} was ended by signal {-done.returncode}",
                            "Most likely memory ran out: close other programs, or choose fewer bits.")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{path} could not be measured: {reason}", "Try `gptq-belle inspect` on it.")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def measure(path: str, device: str, precision: str | None, head_bits: int | None, cache: str, prompt: int,
            batch: int) -> Footprint:
    """Measure in this process, which should have done nothing else before; arguments as of `fresh`."""
    from gptq_belle.engine.model import load

    release_unused()
    with PeakMemory() as peak:
        began = time.perf_counter()
        model = load(path, device=device, precision=precision, head_bits=head_bits, cache=cache)
        load_seconds = time.perf_counter() - began
        loaded = anonymous_bytes()
        logits, session = model.prefill(torch.ones(batch, prompt, dtype=torch.int64))
        for _ in range(STEPS):
            logits = model.decode(logits.argmax(-1), session)
    start = peak.start or 0
    return Footprint(
        load_seconds=load_seconds,
        loaded_bytes=None if loaded is None else loaded - start,
        peak_bytes=None if peak.bytes is None else peak.bytes - start,
        process_bytes=peak.bytes,
        cuda_bytes=peak.cuda_bytes,
    )


def main() -> None:
    """Answer one request."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request.pop("threads"))
    try:
        print(json.dumps(asdict(measure(**request))))
    except GptqBelleError as error:
        sys.exit(error.cause)


if __name__ == "__main__":
    main()
