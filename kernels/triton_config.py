"""Which Triton kernel a product takes, and with which tiles: a table where someone measured, else a rule.

Tables are made by `gptq-belle tune`: `tuning/sm_90.json` beside this file, or `sm_90.json` in the folder that
GPTQ_BELLE_TUNING names, which goes before:

    {"entries": [{"rows": 16, "outputs": 4096, "inputs": 4096, "bits": 4, "run": 128, "dtype": "float16",
                  "kernel": "skinny",
                  "config": {"BM": 16, "BN": 64, "BK": 128, "SPLIT_K": 4, "num_warps": 4, "num_stages": 4}}]}

Rows are counted in BUCKETS: as many kernels are ever compiled for a weight as there are buckets, all of which can be
compiled before the first request. Nothing is tried out at run time, so that the same input gives the same output.
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROW_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # rows of x, up to; the last is open
MAX_SKINNY_ROWS = 64
KERNELS = ("skinny", "gemm", "expand")
# Registers a thread that ptxas may use in the kernel for few rows, by BM. Left alone, it stays below some number of
# programs a multiprocessor, at the cost of up to 9 % more instructions in the loop (BM 8), and now and then of spills.
REGISTERS = {8: 128, 16: 128, 32: 160}
HOPPER = (90, 100, 103)  # whose matrix instructions are those of four warps together
SHARED_MEMORY_KIB = {  # per program, by compute capability
    80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}


class TileConfig(NamedTuple):
    """The tile of one program and how it is compiled."""

    BM: int  # rows of x
    BN: int  # outputs
    BK: int  # inputs of a step: at most the block of the layout, and at least half of it
    SPLIT_K: int  # programs that share one tile's inputs
    num_warps: int
    num_stages: int  # steps under way at a time


class LaunchPlan(NamedTuple):
    """A kernel, and its config; none for "expand"."""

    kernel: str  # one of KERNELS
    config: TileConfig | None


class MatmulProblem(NamedTuple):
    """What a plan depends on, besides the processor."""

    rows: int  # one of BUCKETS
    outputs: int  # N
    inputs: int  # K', the places of the layout
    bits: int  # of a code in memory, 4 or 8
    run: int  # inputs that share a scale
    dtype: str  # of x: "float16" or "bfloat16"


def row_bucket(rows: int) -> int:
    """The smallest of BUCKETS that holds `rows`, or the last."""
    return next((most for most in ROW_BUCKETS if rows <= most), ROW_BUCKETS[-1])


@lru_cache(maxsize=4096)
def launch_plan(case: MatmulProblem, arch: int, processors: int) -> LaunchPlan:
    """The kernel and config of a case.

    Args:
        arch: compute capability as one number, 86 for 8.6.
        processors: multiprocessors of the device.
    """
    return tuned_plans(arch).get(case) or default_plan(case, arch, processors)


def default_plan(case: MatmulProblem, arch: int, processors: int) -> LaunchPlan:
    """What is taken where nobody measured: reasoned from the sizes of memories, not from times.

    Expanding the weight costs 2.5 to 5 bytes of traffic for each of its values, which many rows share; where tensor
    cores are fast for the memory (8.0, 9.0, 10.0), unpacking in front of them would hold them up: there it pays from
    1024 rows.
    """
    if case.rows <= MAX_SKINNY_ROWS:
        most = case.rows == MAX_SKINNY_ROWS
        warps = 8 if most and arch not in HOPPER else 4  # with four warps, 8 bits spill
        config = TileConfig(case.rows, 64, 128, 1, warps, 3 if most else 4)
        return LaunchPlan("skinny", config._replace(SPLIT_K=split_k(case, config, 4 * processors)))
    if case.rows >= 1024 and arch in (80, 90, 100, 103):
        return LaunchPlan("expand", None)
    config = TileConfig(128, 128, 64 if SHARED_MEMORY_KIB.get(arch, 99) < 128 else 128, 1, 8, 3)
    return LaunchPlan("gemm", config._replace(SPLIT_K=split_k(case, config, 2 * processors)))


def split_k(case: MatmulProblem, config: TileConfig, programs: int) -> int:
    """Among how many programs K is split, a power of two up to 16: as many as bring `programs` of them to the device.

    Each keeps 4 blocks of inputs or more, so that its pipeline fills.
    """
    tiles = -(-case.rows // config.BM) * -(-case.outputs // config.BN)
    parts = 1
    while parts < 16 and tiles * parts < programs and case.inputs // (2 * parts) >= 4 * config.BK:
        parts *= 2
    return parts


@lru_cache(maxsize=8)
def tuned_plans(arch: int) -> dict[MatmulProblem, LaunchPlan]:
    """What was measured on a processor, shipped or by the user.

    Raises:
        ValueError: a file that is not such a table; it is named.
    """
    found: dict[MatmulProblem, LaunchPlan] = {}
    for path in tuning_files(arch):
        try:
            for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
                kernel, config = entry["kernel"], entry.get("config")
                if kernel not in KERNELS:
                    raise ValueError(f"kernel {kernel!r} is not one of {', '.join(KERNELS)}")
                case = MatmulProblem(**{name: entry[name] for name in MatmulProblem._fields})
                found[case] = LaunchPlan(kernel, None if config is None else TileConfig(**config))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a table of tuned kernels: {error!r}") from error
    return found


def tuning_files(arch: int) -> list[Path]:
    """The files to read, the one that goes before last."""
    folders = [Path(__file__).parent / "tuning", os.environ.get("GPTQ_BELLE_TUNING")]
    paths = [Path(folder) / f"sm_{arch}.json" for folder in folders if folder]
    return [path for path in paths if path.is_file()]
