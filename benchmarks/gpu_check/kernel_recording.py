"""Which Triton kernels the product launches for a case, and their compilation, without a GPU.

The product's functions run on meta tensors. A hook of Triton gets each kernel before its compilation, keeps what
identifies it (Triton's "specialization data"), and stops the launch. From these data any process compiles the kernel,
under the key in Triton's cache that a launch on the device looks for. A process that uses this file must not use a GPU.
"""

import json
import logging
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import torch

META = torch.device("meta")
Case = Callable[[torch.device], object]  # runs a function of the product with tensors on the given device


class KernelSpec(NamedTuple):
    """What identifies a compiled kernel; equal kernels of different cases are equal."""

    module: str
    function: str
    data: str  # Triton's specialization data, JSON

    def __str__(self) -> str:
        data = json.loads(self.data)
        options = {name: data["options"][name] for name in ("num_warps", "num_stages")}
        return f"{self.function} {data['constant_vals']} {options}"


class AbsentDriver:
    """What Triton asks of a device before a launch, answered for a GPU that need not be present."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        """The target of every compilation."""
        return self._target

    def get_current_device(self) -> int:
        """The only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0


def pretend(arch: int, processors: int) -> None:
    """Let Triton and the product find a GPU of this compute capability (90 for 9.0) and number of multiprocessors."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined
    torch.set_num_threads(1)
    logging.getLogger("triton.runtime.build").setLevel(logging.ERROR)  # which reports launchers that cannot be loaded
    from triton.runtime import driver

    from gptq_belle.kernels import triton_matmul

    driver.set_active(AbsentDriver(arch))
    triton_matmul.device_properties = lambda device: (arch, processors)  # type: ignore[assignment]


def record(cases: Sequence[Case]) -> list[KernelSpec]:
    """The kernels that these cases launch, each once, in the order of their first launch."""
    from triton import knobs

    found: dict[KernelSpec, None] = {}

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found[KernelSpec(fn.module, fn.name.split(".")[-1], compile["specialization_data"])] = None
        return True  # Triton then neither compiles nor launches

    knobs.runtime.jit_cache_hook = keep
    try:
        for case in cases:
            case(META)
    finally:
        knobs.runtime.jit_cache_hook = None
    return list(found)


def compile_kernel(spec: KernelSpec, with_launcher: bool) -> str:
    """Compile a kernel into Triton's cache; returns its key there.

    Args:
        with_launcher: also build the C modules that launch it; needs a C compiler and Python.h.
    Raises:
        Exception: errors of Triton, ptxas and the C compiler propagate.
    """
    function = getattr(import_module(spec.module), spec.function)
    compiled = function.preload(spec.data)
    function.device_caches.clear()  # `record` in this process would launch a kernel that it finds there
    if with_launcher:
        build_launcher(compiled)
    key: str = compiled.hash
    return key


# The key of a launcher holds platform.architecture(), which does not know the format of programs on a machine without
# the command `file`: launchers are built for both.
PROGRAM_FORMATS = ("ELF", "")
_built: set[tuple[str, ...]] = set()  # signatures whose launchers this process built


def build_launcher(compiled: Any) -> None:
    """Build the C modules with which a kernel is launched into the cache. Without CUDA's library they cannot be loaded,
    but are kept. Triton up to 3.7 needs one for each signature of a kernel; later versions have one for all."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build

    signature = tuple(map(str, compiled.src.signature.values()))
    if signature in _built:
        return
    for program_format in PROGRAM_FORMATS:
        key = ",".join([platform.machine(), platform.system(), "64bit", program_format])
        build.platform_key = lambda key=key: key
        if not _built:
            with suppress(ImportError):
                nvidia.CudaUtils()
        if hasattr(nvidia, "make_launcher"):
            with suppress(ImportError):
                nvidia.CudaLauncher(compiled.src, compiled.metadata)
    _built.add(signature)
