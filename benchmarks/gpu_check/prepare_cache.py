"""Compile all kernels of the four parts without a GPU, into a file that a machine with a GPU can use.

    PYTHONPATH=.:benchmarks TRITON_STORE_BINARY_ONLY=1 python -m gpu_check.prepare_cache --arch 90 --processors 132

The machine with the GPU then needs neither a C compiler nor Python.h, and does not spend its time on compilation:
`gpu_check.sh probe --cache build/triton-cache.zip`. Run it with that machine's versions of Python and Triton, and with
a C library that is not newer; see `cache_pack` for what ties a cache to them. It needs torch, numpy and a C compiler.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from gpu_check import cache_pack, correctness, matmul, models, probe, tuning
from gpu_check.compilation import compilers
from gpu_check.kernel_recording import Case
from gpu_check.plan import Deadline
from gpu_check.setting import restricted, setting_of

CUDA_LIBRARY = "libcuda.so.1"  # the launchers are linked with it


def all_cases(arch: int, processors: int) -> list[Case]:
    """What all parts launch at full sizes."""
    setting = restricted(setting_of(toy=False), arch)
    return [*probe.launch_cases(), *correctness.cases(setting, arch, processors), *matmul.cases(setting),
            *models.cases(setting), *tuning.cases(setting, arch, processors)]


def stand_in_for_cuda(folder: Path) -> None:
    """Build a library in place of CUDA's, which only a driver installs. It defines every function that Triton's
    launchers may call, because the linker would drop a library that is not needed. Nothing is run with it."""
    nvidia = Path(str(find_spec("triton").origin)).parent / "backends" / "nvidia"  # type: ignore[union-attr]
    texts = [(nvidia / name).read_text(encoding="utf-8") for name in ("driver.py", "driver.c")]
    functions = sorted(set(re.findall(r"\bcu[A-Z]\w*", " ".join(texts))))
    source = folder / "cuda.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in functions), encoding="utf-8")
    subprocess.run([os.environ.get("CC", "gcc"), "-shared", "-fPIC", f"-Wl,-soname,{CUDA_LIBRARY}", "-o",
                    folder / CUDA_LIBRARY, source], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, required=True, help="compute capability, such as 90 for 9.0")
    parser.add_argument("--processors", type=int, required=True, help="multiprocessors of the GPU")
    parser.add_argument("--out", type=Path, default=Path("build/triton-cache.zip"))
    parser.add_argument("--budget", type=float, default=7200, help="time limit in seconds")
    parser.add_argument("--only", type=int, help="number of cases, for a test")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stand_in_for_cuda(Path(folder))
        cache = Path(os.environ.setdefault("TRITON_CACHE_DIR", str(args.out.parent / "triton-cache")))
        with compilers(args.arch, args.processors, with_launcher=True) as compiling:
            done = compiling.compile(all_cases(args.arch, args.processors)[: args.only], Deadline(args.budget))
    size = cache_pack.pack(cache, args.out)
    print(f"{done.kernels} kernels in {done.seconds:.0f} s, {size / 1e6:.1f} MB in {args.out}", *done.failed,
          *done.missing, sep="\n")
    return bool(done.problem())


if __name__ == "__main__":
    sys.exit(main())
