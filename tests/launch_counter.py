"""A simulated GPU for tests of the CUDA path on machines without one, which counts what the path does.

Its tensors are on cuda:0 for all Python code, and their values are in the CPU's memory, where torch's operations are
computed. Triton's kernels run in the interpreter if TRITON_INTERPRET is 1; otherwise they are only counted, and new
memory holds zeros. An operation on tensors of both devices raises RuntimeError, as on a GPU; so does indexing with a
list, which a GPU would copy, a kernel that is given a tensor of the CPU, and a launch while another GPU is selected.

    with simulate(monkeypatch) as gpu:
        model = gptq_belle.load(path, device="cuda:0")
        with gpu.counting() as counts:
            model.decode(tokens, batch)
    counts.total("operation")
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
H100 = SimpleNamespace(name="simulated", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
                       L2_cache_size=50 << 20)
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
UNCOUNTED = (*EMPTY, "detach_", "lift_fresh")  # launch nothing
COPIES = ("to", "_to_copy", "copy_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
WAITING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
READERS = ("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__contains__")


class Counts(Counter[tuple[str, str]]):
    """Numbers by kind and name: ("kernel", "skinny_kernel"), ("operation", "add_"), ("graph", "replay"), ("to device",
    "to"), ("to host", "item"), ("allocation", "add").

    Kernels are counted when a graph is replayed, not when it is captured. Views are not counted. An allocation is a
    result in new memory, of an operation that is counted besides unless it only allocates. What
    makes the host wait for the GPU counts as "to host": reading a value, and a shape that depends on values. Under
    `torch.inference_mode` an operation is what Python calls, such as rms_norm; CUDA may take several kernels for it.
    """

    def total(self, kind: str) -> int:
        """The sum of a kind."""
        return sum(number for (own, _), number in self.items() if own == kind)

    def totals(self) -> dict[str, int]:
        """The sums of all kinds but allocations."""
        return {kind: self.total(kind) for kind in ("operation", "kernel", "graph", "to device", "to host")}


class GpuTensor(Tensor):
    """A tensor on the simulated GPU; `memory` has its values."""

    memory: Tensor
    gpu: "SimulatedGpu"

    @staticmethod
    def __new__(cls, values: Tensor, gpu: "SimulatedGpu") -> "GpuTensor":
        # For C++ it is on the meta device: a build of torch without CUDA cannot index a tensor of that.
        with torch.inference_mode(False):
            made = Tensor._make_wrapper_subclass(cls, values.shape, values.stride(), values.storage_offset(),
                                                 dtype=values.dtype, device="meta")
        made.memory, made.gpu = values, gpu
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READERS and isinstance(args[0], GpuTensor):
            args[0].gpu.counts["to host", name] += 1
            return func(args[0].memory, *args[1:], **kwargs or {})
        if name == "__setitem__" and not isinstance(args[2], Tensor):
            return args[0][args[1]].fill_(args[2])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the simulated GPU is used after the simulation has ended")


class SimulatedGpu(TorchDispatchMode):
    """The GPU; a context in which it can be used.

    Attributes:
        counts: since it was created.
        fill: value of new floating-point memory.
        launched: variants of kernels that were launched.
        compiled: variants of kernels that were compiled before, and what the compiler returned.
        captured: launches of the graph that is being captured; None if none is.
        is_selected: whether it is torch's current device; outside of torch.cuda.device another GPU is.
    """

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.fill, self.counts = fill, Counts()
        self.launched: set[tuple[object, ...]] = set()
        self.compiled: dict[tuple[object, ...], object] = {}
        self.captured: list[Callable[[], None]] | None = None
        self.is_selected = False

    def __enter__(self) -> "SimulatedGpu":
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(data, device="cuda") then calls `to`
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Count what is done in this context only."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            before.update(self.counts)
            self.counts = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        if name == "pin_memory":
            return args[0]
        leaves = tree_leaves((args, kwargs))
        own = [leaf for leaf in leaves if isinstance(leaf, GpuTensor)]
        targets = [leaf.type for leaf in leaves if isinstance(leaf, torch.device)]
        if not own and "cuda" not in targets:
            return func(*args, **kwargs)
        host = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, GpuTensor) and leaf.dim()]
        if host and name not in COPIES:
            raise RuntimeError(f"{name}: expected all tensors on one device, found {CUDA} and {host[0].device}")
        result = func(*tree_map(_memory, args), **tree_map(_memory, kwargs))
        if own and name in COPIES and ("cpu" in targets or not isinstance(args[0], GpuTensor)):
            self.counts["to host", name] += 1
            return result.clone()
        self._count(func, name, result, own, host)
        if host and not own:
            result = result.clone()  # on one machine, `to` has copied nothing
        if name in EMPTY and result.is_floating_point():
            result.fill_(self.fill)
        return tree_map(lambda leaf: GpuTensor(leaf, self) if isinstance(leaf, Tensor) else leaf, result)

    @contextmanager
    def select(self, device: object) -> Iterator[None]:
        """`torch.cuda.device` and `torch.cuda.device_of`."""
        before, self.is_selected = self.is_selected, True
        try:
            yield
        finally:
            self.is_selected = before

    def check_selected(self, what: str) -> None:
        """Raise RuntimeError for something that would go to the current stream of another GPU."""
        if not self.is_selected:
            raise RuntimeError(f"{what} on the current stream of another GPU")

    @contextmanager
    def capture(self, graph: "SimulatedGraph", *_: Any, **options: Any) -> Iterator[None]:
        """`torch.cuda.graph` for launches; torch's operations are executed and not captured."""
        self.captured = graph.launches
        try:
            yield
        finally:
            self.captured = None

    def _count(self, func: Any, name: str, result: Any, own: list[GpuTensor], host: list[Tensor]) -> None:
        given = {tensor.memory.untyped_storage().data_ptr() for tensor in own}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.counts["allocation", name] += any(leaf.untyped_storage().data_ptr() not in given for leaf in results)
        is_view = not func._schema.is_mutable and all(
            leaf.untyped_storage().data_ptr() in given for leaf in results)
        masks = any(tensor.dtype is torch.bool for tensor in own[1:])
        waits = masks if name in INDEXING else any(tag in func.tags for tag in WAITING)
        if host:
            self.counts["to device", name] += any(tensor.numel() for tensor in host)
        elif waits or not results:
            self.counts["to host", name] += 1
        elif not is_view and name not in UNCOUNTED:
            self.counts["operation", name] += 1

    def launch(self, kernel: Any, arguments: dict[str, Any], warmup: bool, execute: Callable[[], None]) -> object:
        """Execute a launch and count it, capture it, or return one object for all launches that share its code.

        Args:
            kernel: Triton's object.
            arguments: arguments and compiler options by name.
            execute: what a launch does besides.
        Raises:
            RuntimeError: a tensor is not on the GPU.
        """
        self.check_selected(kernel.__name__)
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        for name, tensor in tensors.items():
            if not isinstance(tensor, GpuTensor):
                raise RuntimeError(f"{kernel.__name__}: {name} cannot be accessed from Triton (cpu tensor?)")
        plain = getattr(kernel, "do_not_specialize", ())
        variant = kernel.__name__, *((name, None if name in plain else _specialized(value))
                                     for name, value in sorted(arguments.items()))
        if warmup:
            return self.compiled.setdefault(variant, object())

        def run() -> None:
            self.launched.add(variant)
            self.counts["kernel", kernel.__name__] += 1
            execute()

        run() if self.captured is None else self.captured.append(run)
        return None


class SimulatedGraph:
    """`torch.cuda.CUDAGraph` on the simulated GPU."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self.gpu = gpu
        self.launches: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Make all launches again, on the present contents of memory."""
        self.gpu.check_selected("a graph is replayed")
        self.gpu.counts["graph", "replay"] += 1
        for launch in self.launches:
            launch()


def _memory(leaf: Any) -> Any:
    if isinstance(leaf, GpuTensor):
        return leaf.memory
    return CPU if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf


def _specialized(value: Any) -> object:
    """What Triton compiles a kernel for: dtype and alignment of a tensor; 1, multiples of 16 and others of numbers."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        return "multiple of 16" if value % 16 == 0 else "integer"
    return value


def simulate(monkeypatch: Any) -> SimulatedGpu:
    """A simulated H100 that takes the place of torch.cuda and of Triton's launcher until the test ends."""
    from gptq_belle.kernels import triton_matmul, triton_skinny_launch

    gpu = SimulatedGpu(float("nan") if triton_matmul.is_interpreted() else 0.0)
    if triton_matmul.is_interpreted():
        from triton.runtime.interpreter import InterpretedFunction as Kernel
    else:
        from triton.runtime.jit import JITFunction as Kernel
    execute = Kernel.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> object:
        parameters = inspect.signature(self.fn).parameters
        options = {name: value for name, value in kwargs.items() if name not in parameters}
        bound = inspect.signature(self.fn).bind(*args, **{name: kwargs[name] for name in kwargs if name in parameters})

        def interpret() -> None:
            if triton_matmul.is_interpreted():
                execute(self, *tree_map(_memory, args), grid=grid, warmup=False, **tree_map(_memory, kwargs))

        return gpu.launch(self, bound.arguments | options, warmup, interpret)

    monkeypatch.setattr(Kernel, "run", run)
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 1, "_lazy_init": lambda: None,
        "device": gpu.select, "device_of": gpu.select, "Stream": lambda device: SimpleNamespace(device=device),
        "get_device_properties": lambda device: H100, "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device: SimpleNamespace(cuda_stream=0), "graph": gpu.capture,
        "CUDAGraph": lambda: SimulatedGraph(gpu),
        "Event": lambda: SimpleNamespace(record=lambda: gpu.check_selected("an event"), synchronize=lambda: None),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(triton_skinny_launch, "_tickets", {})
    monkeypatch.setattr(triton_matmul, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(triton_matmul, "device_properties", lambda device: (90, 132))
    return gpu
