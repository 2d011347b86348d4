"""Shared by the GPU benchmarks: shapes, random weights, a time limit, the header of a result file."""

import datetime
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_belle import __version__
from gptq_belle.kernels.triton_layout import COLUMNS, SlicedWeight, block_inputs, unpack_slices

GROUP = 128
SHAPES = {  # (in_features, out_features) of every linear in a block
    "belle-7b": [(4096, 12288), (4096, 4096), (4096, 16384), (16384, 4096)],
    "llama-7b": [(4096, 4096), (4096, 11008), (11008, 4096)],
    "llama-13b": [(5120, 5120), (5120, 13824), (13824, 5120)],
}
INSTALLED = ("triton", "gemlite", "gptqmodel")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Deadline:
    """A time limit in seconds; callers report what they skip because of it."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() > self.end


def random_weight(inputs: int, outputs: int, bits: int, device: torch.device, run: int = GROUP) -> SlicedWeight:
    """A random symmetric weight with groups of `run` in the kernels' layout; `inputs` is a multiple of 128."""
    block, columns = block_inputs(bits, run), -(-outputs // COLUMNS) * COLUMNS
    words = torch.randint(-(2**15), 2**15, (inputs // block, columns, block * bits // 16), dtype=torch.int16,
                          device=device)
    scales = (torch.rand(inputs // run, columns, device=device) * 0.01 + 0.005).half()
    g_idx = torch.arange(inputs, dtype=torch.int32, device=device) // run
    return SlicedWeight(words, scales, None, None, g_idx, inputs, outputs, run, bits, 2 ** (bits - 1), bits,
                        inputs // run, 1)


def codes_of(weight: SlicedWeight) -> tuple[Tensor, Tensor]:
    """Codes (K, N) uint8 and scales (G, N) float16 of a `random_weight`."""
    n = weight.out_features
    return unpack_slices(weight.words[:, :n], weight.bits), weight.scales[:, :n]


def expanded(weight: SlicedWeight) -> Tensor:
    """The dequantized weight (K, N) in float32."""
    codes, scales = codes_of(weight)
    return (codes.float() - weight.zero) * scales.float().repeat_interleave(weight.run, 0)


def require_device() -> torch.device:
    """Return the GPU; exit with a message if there is none that the kernels support."""
    from gptq_belle.kernels import triton_matmul

    device = torch.device("cuda", 0)
    if lacking := triton_matmul.unavailable_reason(device):
        raise SystemExit(f"A GPU that the Triton kernels support is required: {lacking}.")
    return device


def head(device: torch.device) -> dict[str, Any]:
    """Date, machine and versions: the header of a result file."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "date": datetime.date.today().isoformat(),
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "versions": {"gptq_belle": __version__, "python": platform.python_version(), "torch": torch.__version__,
                     "cuda": torch.version.cuda, **{name: _version(name) for name in INSTALLED}},
    }


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write NAME.json into a folder, creating the folder if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
