"""Which Triton kernel a product takes, and with which tiles: a measured table if there is one, otherwise a rule.

`gptq-belle tune` writes the tables: `tuning/sm_90.json` beside this file, or `sm_90.json` in the folder that
GPTQ_BELLE_TUNING names, which takes precedence:

    {"entries": [{"rows": 16, "outputs": 4096, "inputs": 4096, "bits": 4, "run": 128, "dtype": "float16",
                  "kernel": "skinny",
                  "config": {"BM": 16, "BN": 64, "BK": 128, "SPLIT_K": 4, "num_warps": 2, "num_stages": 4,
                             "K_WARPS": 1}}]}

The number of rows is rounded up to one of ROW_BUCKETS, so that at most one kernel per bucket is compiled for a weight,
and all of them can be compiled before the first request. Nothing is measured at run time: the same input gives the same
output.
"""

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

ROW_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # upper limits of rows of x; the last one is open
MAX_SKINNY_ROWS = 64
KERNELS = ("skinny", "gemm", "expand")
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)  # numbers of programs among which the rule divides K
MIN_BLOCKS = 4  # of K for each of those programs, so that its pipeline fills
TENSOR_CORES = 80  # the lowest compute capability whose tensor cores Triton uses
WGMMA = (90, 100, 103)  # compute capabilities whose matrix instructions are shared by four warps
# Those for which Triton before 3.9 compiles a tile of 128 x 128 to an empty kernel (seen with 3.5.1, 3.6, 3.7.1, 3.8).
EMPTY_SQUARE_TILE = (100, 103, 110)
REGISTERS = 65536  # of a multiprocessor
SHARED_MEMORY_KIB = {  # per program, by compute capability; a multiprocessor has 1 KiB more
    75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
# What a multiprocessor needs in flight to use its share of the memory bandwidth, by compute capability: KiB of weights
# (bandwidth times latency), and warps (instructions per weight, of which a warp issues one in four cycles). Calculated
# for A100, H200 and B200; other GPUs have less bandwidth per multiprocessor.
IN_FLIGHT = {80: (11, 6), 90: (26, 9), 100: (39, 14), 103: (39, 14)}
IN_FLIGHT_OTHERS = (5, 2)
TICKET_COST = 5  # of a split K, in blocks of 64 outputs: 1.2 microseconds on an H200, calculated
LOST_SHARE = 0.15  # of the last wave, where programs do not all run at once
MAX_ELEMENTS = 2**31 - 2**12  # that 32-bit offsets address, with room for the masked end of a tile


class TileConfig(NamedTuple):
    """The tile of one program and how it is compiled."""

    BM: int  # rows of x
    BN: int  # outputs
    BK: int  # inputs of a step: at most the block of the layout, and at least half of it
    SPLIT_K: int  # programs that share the inputs of one tile
    num_warps: int
    num_stages: int  # steps in flight at a time
    K_WARPS: int = 1  # blocks of inputs that different warps of the kernel for few rows process at a time

    def step(self, block: int) -> int:
        """BK for a layout with blocks of `block` inputs."""
        return max(min(self.BK, block), block // 2)


class UnsupportedTileError(ValueError):
    """A tile that Triton does not compile for a GPU."""


class LaunchPlan(NamedTuple):
    """A kernel and its config; "expand" has none."""

    kernel: str  # one of KERNELS
    config: TileConfig | None


class MatmulProblem(NamedTuple):
    """What a plan depends on, besides the device."""

    rows: int  # one of ROW_BUCKETS
    outputs: int  # N
    inputs: int  # K', the places of the layout
    bits: int  # of a code in memory, 4 or 8
    run: int  # inputs that share a scale
    dtype: str  # of x: "float16" or "bfloat16"


def row_bucket(rows: int) -> int:
    """The smallest of ROW_BUCKETS that holds `rows`, or the last one."""
    return next((most for most in ROW_BUCKETS if rows <= most), ROW_BUCKETS[-1])


@lru_cache(maxsize=4096)
def launch_plan(problem: MatmulProblem, arch: int, processors: int) -> LaunchPlan:
    """The kernel and config of a product.

    Args:
        arch: compute capability as one number, 86 for 8.6.
        processors: multiprocessors of the device.
    """
    return tuned_plans(arch).get(problem) or default_plan(problem, arch, processors)


def default_plan(problem: MatmulProblem, arch: int, processors: int) -> LaunchPlan:
    """The plan where nothing was measured: derived from machine code and the sizes of memories, not from times.

    Expanding the weight costs 2.5 to 5 bytes of traffic per value, which many rows share. Where tensor cores are fast
    compared with the memory (8.0, 9.0, 10.0), unpacking before them would hold them up: there it pays from 1024 rows.
    """
    if arch < TENSOR_CORES and problem.rows > 16:
        return LaunchPlan("expand", None)  # cuBLAS uses the tensor cores
    if problem.rows <= MAX_SKINNY_ROWS:
        return LaunchPlan("skinny", skinny_config(problem, arch, processors))
    if problem.rows >= 1024 and arch in (80, 90, 100, 103):
        return LaunchPlan("expand", None)
    # A step of 64 inputs where memory is small, and for 8 bits, which would spill with two programs a multiprocessor.
    short = SHARED_MEMORY_KIB.get(arch, 99) < 128 or (arch in WGMMA and problem.bits == 8)
    rows = 64 if arch in EMPTY_SQUARE_TILE else 128
    config = TileConfig(rows, 128, 64 if short else 128, 1, 8, 3)
    programs = processors * programs_per_multiprocessor("gemm", config, problem, arch)
    return LaunchPlan("gemm", config._replace(SPLIT_K=split_k(problem, config, programs)))


def skinny_config(problem: MatmulProblem, arch: int, processors: int) -> TileConfig:
    """The tile for few rows and the split of K with the lowest calculated time.

    K is shared by warps of a program where the outputs alone fill the device evenly, otherwise by several programs.
    """
    tiles = [skinny_tile(problem, arch)]
    if arch >= TENSOR_CORES and problem.rows == 8:
        tiles.append(TileConfig(8, 32, 128, 1, 4, 4, 4))
        if SHARED_MEMORY_KIB.get(arch, 99) > 160:  # what Triton 3.8 takes for the larger one; 3.6 takes 65
            tiles += [TileConfig(8, 32, 128, 1, 8, 3, 8), TileConfig(8, 32, 128, 1, 16, 2, 16)]
    tiles = [tile for tile in tiles if 32 * tile.num_warps * (max_registers(
        "skinny", tile, problem.bits, problem.run, arch) or 0) <= REGISTERS]
    steps = problem.inputs // 128
    found = [tile._replace(SPLIT_K=parts) for tile in tiles for parts in SPLITS
             if parts == 1 or steps >= parts * max(MIN_BLOCKS, 2 * tile.K_WARPS)]
    return min(found, key=lambda config: skinny_cost(problem, config, arch, processors))


def skinny_cost(problem: MatmulProblem, config: TileConfig, arch: int, processors: int) -> float:
    """The time of a product of few rows, in blocks of 64 x 128 weights that each multiprocessor reads.

    The multiprocessor with most programs decides, unless there are more programs than run at a time. It uses its share
    of the memory bandwidth if enough bytes and warps are in flight (IN_FLIGHT).
    """
    programs = -(-problem.rows // config.BM) * -(-problem.outputs // config.BN) * config.SPLIT_K
    resident = programs_per_multiprocessor("skinny", config, problem, arch)
    if resident == 1 and programs > processors:
        return math.inf  # nothing would be read while a program starts or ends
    turns = -(-problem.inputs // (128 * config.K_WARPS * config.SPLIT_K))
    own = turns * config.K_WARPS * config.BN / 64  # blocks of a program
    if programs <= resident * processors:
        blocks, together = own * -(-programs // processors), min(resident, programs / processors)
    else:
        blocks, together = own * (programs / processors + LOST_SHARE * resident), resident
    kib, warps = IN_FLIGHT.get(arch, IN_FLIGHT_OTHERS)
    own_kib = (config.num_stages - 1) * config.K_WARPS * config.BN * 128 * problem.bits / 8 / 1024
    slowdown = max(1.0, kib / (together * own_kib), warps / (together * config.num_warps))
    return blocks * slowdown + (TICKET_COST if config.SPLIT_K > 1 else 0)


def skinny_tile(problem: MatmulProblem, arch: int) -> TileConfig:
    """The tile for few rows whose warps process the same inputs.

    Up to 16 rows two warps take 1.9 instead of 2.3 instructions per weight. They also leave the compiler no choice of
    matrix instructions on 9.0: with four warps some versions of Triton choose WGMMA, which takes 3.1.
    """
    plain = _is_plain(problem.bits, problem.run)
    if arch < TENSOR_CORES:  # multiply-adds, whose operands take more registers; nothing is copied asynchronously
        return TileConfig(problem.rows, 64, 128 if plain and problem.rows == 8 else 64, 1, 2, 2)
    if problem.rows <= 16:
        return TileConfig(problem.rows, 64, 128, 1, 2, 4)
    if problem.rows <= 32:
        return TileConfig(32, 64, 128, 1, 2 if plain else 4, 4)  # other formats spill with two warps
    long = plain or (arch in WGMMA and problem.run > 32)  # a longer step takes more than 168 registers elsewhere
    return TileConfig(64, 64, 128 if long else 64, 1, 4, 3)


def split_k(problem: MatmulProblem, config: TileConfig, programs: int) -> int:
    """The number of programs among which K is split for many rows: one of SPLITS that fills whole waves of the device.

    The time of a wave is counted in blocks of K: those of one program, and two more to fill its pipeline and to write
    its sums. The launch that adds the sums is counted as two blocks.

    Args:
        programs: that run at a time on the device.
    """
    tiles = -(-problem.rows // config.BM) * -(-problem.outputs // config.BN)
    blocks = problem.inputs // 128

    def cost(parts: int) -> int:
        return -(-tiles * parts // programs) * (-(-blocks // parts) + 2) + (2 if parts > 1 else 0)

    return min((parts for parts in SPLITS if parts == 1 or blocks >= MIN_BLOCKS * parts), key=cost)


def programs_per_multiprocessor(kernel: str, config: TileConfig, problem: MatmulProblem, arch: int) -> int:
    """How many programs of a kernel run on a multiprocessor at a time, by its registers and shared memory."""
    registers = max_registers(kernel, config, problem.bits, problem.run, arch) or (128 if config.BK == 64 else 168)
    inputs = config.BK * config.K_WARPS
    weight, x = config.BN * inputs * problem.bits // 8, config.BM * inputs * 2
    copies = config.num_stages - 1
    # WGMMA reads x from shared memory after the next copy was started.
    own = copies * weight + (copies + 1 if arch in WGMMA and config.num_warps >= 4 else copies) * x
    return max(1, min(REGISTERS // (registers * 32 * config.num_warps), shared_memory(arch) // (own + 1024)))


def shared_memory(arch: int) -> int:
    """Bytes of shared memory of a multiprocessor, of which each program takes 1024 more than it asks for."""
    return (SHARED_MEMORY_KIB.get(arch, 99) + 1) * 1024


def launch_options(kernel: str, config: TileConfig, bits: int, run: int, arch: int) -> dict[str, Any]:
    """How Triton compiles one of the matmul kernels.

    Raises:
        UnsupportedTileError: Triton does not compile this tile for this compute capability.
    """
    if kernel == "gemm" and arch in EMPTY_SQUARE_TILE and config.BM == config.BN == 128:
        raise UnsupportedTileError(f"Triton compiles tiles of 128 x 128 to empty kernels for compute capability "
                                   f"{arch / 10}. Use 64 rows or 64 outputs per tile.")
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True,
            "maxnreg": max_registers(kernel, config, bits, run, arch)}


def max_registers(kernel: str, config: TileConfig, bits: int, run: int, arch: int) -> int | None:
    """Registers per thread that ptxas may use, or None for its own choice.

    Left to itself, ptxas aims at some number of programs per multiprocessor, at the cost of up to 9 % more instructions
    in the loop, and sometimes of spills. Groups of 32 and 64 need more registers for their scales.
    """
    if arch < TENSOR_CORES:
        return 255
    if kernel == "gemm":
        return 128 if arch == 90 else None  # two programs a multiprocessor
    plain = _is_plain(bits, run)
    if config.BM <= 16:
        spills = run == 32 and 100 <= arch < 120  # by 8 bytes with 128 registers
        return 128 if plain or (config.BM == 8 and not spills) else 168
    if config.BM == 32:
        return 160
    return 168 if plain else None


def _is_plain(bits: int, run: int) -> bool:
    """Whether a format has 4 bits and one scale per block: it needs the fewest registers."""
    return bits == 4 and run == 128


def check_offsets(**elements: int) -> None:
    """Refuse tensors that the kernels, whose offsets have 32 bits, cannot address; elements are counted by name.

    Raises:
        ValueError: a tensor with more than MAX_ELEMENTS elements.
    """
    for name, count in elements.items():
        if count > MAX_ELEMENTS:
            raise ValueError(f"{name} has {count} elements, and the Triton kernels address at most {MAX_ELEMENTS}. "
                             "Use fewer rows at a time, or split the layer.")


@lru_cache(maxsize=8)
def tuned_plans(arch: int) -> dict[MatmulProblem, LaunchPlan]:
    """The measured plans for a compute capability, from the package and from the user's folder.

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
                problem = MatmulProblem(**{name: entry[name] for name in MatmulProblem._fields})
                found[problem] = plan = LaunchPlan(kernel, None if config is None else TileConfig(**config))
                if plan.config is not None:
                    launch_options(kernel, plan.config, problem.bits, problem.run, arch)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a table of tuned kernels: {error!r}") from error
    return found


def tuning_files(arch: int) -> list[Path]:
    """The tables to read, in order of increasing precedence."""
    folders = [Path(__file__).parent / "tuning", os.environ.get("GPTQ_BELLE_TUNING")]
    paths = [Path(folder) / f"sm_{arch}.json" for folder in folders if folder]
    return [path for path in paths if path.is_file()]
