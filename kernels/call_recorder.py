"""Calls of the native kernels, recorded once and replayed in one call, as a CUDA graph does on a GPU.

Products read megabytes each, so that the data of whatever Python does between them comes from memory again, and the
kernels wait. A decode step makes the same calls every time, on the same memory. benchmarks/bench_generate.py measures
both ways.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import Array, c_double
from typing import Any

import torch
from torch import Tensor

from .native_library import require_library
from .native_structs import CallStruct

PRODUCT, ATTENTION, RMS_NORM, LAYER_NORM, SILU_AND_MUL, GELU = CALL_KINDS = range(6)  # `CallKind` of native.h
BAD_INDEX = 1  # status of a call; 0 is success, another number means that memory is exhausted
_recording = threading.local()


class CallRecorder:
    """The calls that one thread makes while this recorder records, in their order.

    The recorder owns the memory of the results. Results of one block are read until the end of the next block, so two
    sets of buffers serve all blocks.

    Attributes:
        seconds: time by kind of call, accumulated by replays unless it is None.
    """

    def __init__(self) -> None:
        self._calls: list[CallStruct] = []
        self._referenced: list[Any] = []  # objects that calls point to
        self._free = defaultdict[tuple[int, ...], list[Tensor]](list)
        self._previous_block: list[Tensor] = []
        self._this_block: list[Tensor] = []
        self._recorded: Any = None
        self.seconds: Array[c_double] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Execute and record the calls made in this context."""
        _recording.recorder = self
        try:
            yield
        finally:
            _recording.recorder = None
        self._recorded = (CallStruct * len(self._calls))(*self._calls)

    def replay(self) -> None:
        """Make all calls again, on the present contents of memory.

        Raises:
            ValueError, MemoryError: as for `execute`.
        """
        lib = require_library()
        _check_status(
            lib.run(self._recorded, len(self._recorded), torch.get_num_threads(), lib.isa_index(None), self.seconds))

    def add(self, call: CallStruct, referenced: Any) -> None:
        """Add a call, and the objects that it points to."""
        self._calls.append(call)
        self._referenced.append(referenced)

    def next_block(self) -> None:
        """Free the results of the block before the last one."""
        for tensor in self._previous_block:
            self._free[tuple(tensor.shape)].append(tensor)
        self._previous_block, self._this_block = self._this_block, []

    def empty_result(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for a result, float32 on the CPU."""
        free = self._free[shape]
        self._this_block.append(free.pop() if free else _empty(shape))
        return self._this_block[-1]


def empty_result(*shape: int) -> Tensor:
    """Memory for a result, float32 on the CPU; the recorder's while one records."""
    recorder: CallRecorder | None = getattr(_recording, "recorder", None)
    return _empty(shape) if recorder is None else recorder.empty_result(shape)


def reject_while_recording(what: str) -> None:
    """Raise RuntimeError while a recorder records: `what` is not a native call, and replays would omit it."""
    if getattr(_recording, "recorder", None) is not None:
        raise RuntimeError(f"{what} cannot be recorded")


def execute(call: CallStruct, referenced: Any, *, isa: str | None = None) -> None:
    """Make a call, and record it if a recorder records.

    Args:
        referenced: objects that the call points to.
        isa: one of `load_library().usable_isas`; by default the fastest.
    Raises:
        ValueError: an index is out of bounds.
        MemoryError: memory is exhausted.
    """
    lib = require_library()
    _check_status(lib.run(call, 1, torch.get_num_threads(), lib.isa_index(isa), None))
    recorder: CallRecorder | None = getattr(_recording, "recorder", None)
    if recorder is not None:
        recorder.add(call, referenced)
        if call.kind == ATTENTION:
            recorder.next_block()


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # regardless of torch's defaults


def _check_status(status: int) -> None:
    if status == BAD_INDEX:
        raise ValueError("an index is out of bounds (a slot or a length of a cache, an input in a weight's order), or "
                         "a slot occurs twice")
    if status:
        raise MemoryError("no memory for activations")
