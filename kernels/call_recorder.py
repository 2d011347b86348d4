"""Calls of the native kernels, recorded once and made again in one: what a CUDA graph is on a GPU.

Between products that read megabytes each, everything that Python touches comes from memory anew, and the kernels wait.
A step of decoding makes the same calls every time, on the same memory. benchmarks/bench_generate.py measures both.
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
BAD_INDEX = 1  # what a call returns; else 0, or that there is no memory
_recording = threading.local()


class CallRecorder:
    """Calls in the order in which they were made while it was recorded, by one thread.

    The recorder owns the memory of the results. Results of one block are read until the end of the next block, so two
    sets of buffers serve all blocks.

    Attributes:
        seconds: by kind of call, added up by replays where it is not None.
    """

    def __init__(self) -> None:
        self._calls: list[CallStruct] = []
        self._kept: list[Any] = []  # what calls point to
        self._free = defaultdict[tuple[int, ...], list[Tensor]](list)
        self._before: list[Tensor] = []
        self._now: list[Tensor] = []
        self._recorded: Any = None
        self.seconds: Array[c_double] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Calls are made and put down."""
        _recording.recorder = self
        try:
            yield
        finally:
            _recording.recorder = None
        self._recorded = (CallStruct * len(self._calls))(*self._calls)

    def replay(self) -> None:
        """Make all calls again, on whatever stands in memory now.

        Raises:
            ValueError, MemoryError: as the calls would.
        """
        lib = require_library()
        _check(lib.run(self._recorded, len(self._recorded), torch.get_num_threads(), lib.number(None), self.seconds))

    def add(self, call: CallStruct, kept: Any) -> None:
        """One more call, and what it points to."""
        self._calls.append(call)
        self._kept.append(kept)

    def next_block(self) -> None:
        """What the block before the last one made is not read any more."""
        for tensor in self._before:
            self._free[tuple(tensor.shape)].append(tensor)
        self._before, self._now = self._now, []

    def memory(self, shape: tuple[int, ...]) -> Tensor:
        """float32 on the CPU for a result."""
        free = self._free[shape]
        self._now.append(free.pop() if free else _memory(shape))
        return self._now[-1]


def empty_result(*shape: int) -> Tensor:
    """Memory for a result, float32 on the CPU: the recorder's where one is recorded."""
    recorder: CallRecorder | None = getattr(_recording, "recorder", None)
    return _memory(shape) if recorder is None else recorder.memory(shape)


def reject_while_recording(what: str) -> None:
    """Raises RuntimeError while a recorder is recorded: `what` is no native call, and would be left out."""
    if getattr(_recording, "recorder", None) is not None:
        raise RuntimeError(f"{what} cannot be recorded")


def execute(call: CallStruct, kept: Any, *, isa: str | None = None) -> None:
    """Make a call, and record it where a recorder is.

    Args:
        kept: what it points to.
        isa: one of `library().usable`; left out, the fastest.
    Raises:
        ValueError: it would have reached beyond a table.
        MemoryError: there is none.
    """
    lib = require_library()
    _check(lib.run(call, 1, torch.get_num_threads(), lib.number(isa), None))
    recorder: CallRecorder | None = getattr(_recording, "recorder", None)
    if recorder is not None:
        recorder.add(call, kept)
        if call.kind == ATTENTION:
            recorder.next_block()


def _memory(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever torch's defaults are


def _check(outcome: int) -> None:
    if outcome == BAD_INDEX:
        raise ValueError("an index is beyond its table (a slot or a length of a cache, an input in a weight's order), "
                         "or a slot is there twice")
    if outcome:
        raise MemoryError("no memory for activations")
