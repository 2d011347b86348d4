"""Build the CPU kernels (kernels/native) into the package; all other settings are in pyproject.toml.

They are a shared library with a C interface, not a Python module, so that one build works with every version of Python:
the file is named `_native.so` and a wheel is tagged `py3-none-PLATFORM`. There is one source file per instruction set,
each compiled with its own flags. Without a C++17 compiler, or with one that is too old for an instruction set, the
installation continues without these kernels: gptq_belle then computes with torch, and `gptq-belle doctor` reports it.
"""

import os
import platform
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, LinkError, PlatformError

NATIVE = Path("kernels/native")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-rtti",
         "-ffp-contract=off",  # the same arithmetic with every compiler and instruction set
         # To vectorize plain loops. Python's own flags contain -fwrapv, with which gcc 12 does not vectorize many.
         "-fno-math-errno", "-fno-trapping-math", "-fno-wrapv",
         "-g0", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"]  # GCC 12 warns about its own intrinsics
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1", "-g1"]
SANITIZED = bool(os.environ.get("GPTQ_BELLE_SANITIZE"))  # for `make sanitize`
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw"]
# In the order of `InstructionSet` in native/native.h.
ISAS = {
    "portable": [],
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "avx512vnni": [*AVX512, "-mavx512vnni"],
    "amx": [*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"],
}
# Compiled without flags of an instruction set.
COMMON = ["abi", "instruction_sets", "parallel", "packing", "packed_rows", "matmul", "attention", "elementwise",
          "run_calls", "solver"]


def use_clang_alone() -> None:
    """Use clang if it is the only compiler: Python names the one that built it, which need not be on this machine."""
    stated = os.environ.get("CXX") or shutil.which((sysconfig.get_config_var("CXX") or "g++").split()[0])
    if not stated and shutil.which("clang++"):
        os.environ |= {"CC": "clang", "CXX": "clang++"}


class BuildNative(build_ext):
    """Compile the library, or omit it with a warning."""

    def get_ext_filename(self, fullname: str) -> str:
        """`gptq_belle/kernels/_native.so`, the name by which `kernels/native_library.py` loads it."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(path.stat().st_mtime for path in [Path(__file__), *NATIVE.iterdir()])
        if not self.force and target.is_file() and target.stat().st_mtime > newest:
            return
        try:
            self.build_library(target)
        except (CompileError, ExecError, LinkError, PlatformError) as error:
            target.unlink(missing_ok=True)
            self.warn(f"the CPU kernels are not built, torch is used instead: {error}")

    def build_library(self, target: Path) -> None:
        """Compile every file with its flags, in parallel, and link them."""
        sets = list(ISAS) if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]
        with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
            jobs = {name: pool.submit(self.compile, f"isa_{name}", ISAS[name]) for name in sets}
            built = {}
            for name, job in jobs.items():
                try:
                    built[name] = job.result()
                except CompileError:
                    if name == "portable":
                        raise
                    self.warn(f"this compiler does not know {' '.join(ISAS[name])}: no kernels for {name}")
            mask = sum(1 << index for index, name in enumerate(ISAS) if name in built)
            common = [job.result() for job in
                      [pool.submit(self.compile, name, [f"-DBELLE_ISAS={mask}"]) for name in COMMON]]
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object([*built.values(), *common], str(target), target_lang="c++",
                                         extra_postargs=["-pthread", *(SANITIZE if SANITIZED else [])],
                                         build_temp=self.build_temp)

    def compile(self, name: str, flags: list[str]) -> str:
        """Compile one source file and return the path of the object file."""
        (compiled,) = self.compiler.compile([str(NATIVE / f"{name}.cpp")], output_dir=self.build_temp,
                                            extra_postargs=[*FLAGS, *(SANITIZE if SANITIZED else []), *flags])
        return compiled


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 on this platform; not "manylinux", as it needs the C library of the build machine."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tags of Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


use_clang_alone()
setup(
    ext_modules=[Extension("gptq_belle.kernels._native", [str(path) for path in sorted(NATIVE.glob("*.cpp"))],
                           depends=[str(path) for path in sorted(NATIVE.glob("*.h"))], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
