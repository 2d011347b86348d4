"""Fused decode steps on one KV cache: a step for each number of rows and length, recorded as a CUDA graph.

Tokens, slots and lengths stay on the device, and so do parameters and random numbers of sampling. As long as the same
sequences are decoded, a step reads the tokens that the step before has chosen, so the next step can be queued before
the tokens of this one are read. Some requests need the host for their tokens (`Sampler.needs_host`): as long as one of
them is decoded, no step is queued ahead, and its token is copied to the device before the next step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_belle.engine.fused_decoder import FusedDecoder
from gptq_belle.engine.fused_sampling import write_samplers
from gptq_belle.engine.fused_step import FusedStep, StepBuffers
from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.engine.sampling import Sampler
from gptq_belle.engine.slots import DecodingRow
from gptq_belle.kernels import triton_matmul
from gptq_belle.kernels.triton_config import MAX_SKINNY_ROWS, ROW_BUCKETS
from gptq_belle.kernels.triton_launch import Launch

ROWS = (1, 2, 4, 8, 16, 32, 64)  # numbers of rows of a step, rounded up to one of these
SHORTEST = 256  # the smallest length of a step; the others are twice the one before
PROGRAMMATIC_LAUNCH = False  # of every kernel before the one before it ends; not yet seen on a GPU
PROGRAMMATIC_CAPABILITY = 90  # the lowest compute capability that can

StepKey = tuple[int, int, bool]  # rows, length, and whether tokens are sampled
RowState = tuple[Sampler | None, int, int, bool]  # sampler, slot, length, and whether the host gives the token


class StepResult:
    """Memory on the host for the next tokens of a step, which are copied while the next step is queued.

    Attributes:
        logits: (n, V) float32 on the device, which the next step overwrites: of use if a row needs the host.
    """

    logits: Tensor

    def __init__(self, rows: int, device: torch.device) -> None:
        self._tokens, self._sums = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows)
        self._event, self._count = None, 0
        if device.type == "cuda":
            self._tokens, self._sums = self._tokens.pin_memory(), self._sums.pin_memory()
            self._event = torch.cuda.Event()

    def fetch(self, tokens: Tensor, sums: Tensor) -> None:
        """Queue the copy of tokens (n,) and of the sums of their logits (n,)."""
        self._count = len(tokens)
        self._tokens[: self._count].copy_(tokens, non_blocking=True)
        self._sums[: self._count].copy_(sums, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[list[int], list[bool]]:
        """Wait for the step: its tokens, and whether the logits of each row are finite."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens[: self._count].tolist(), self._sums[: self._count].isfinite().tolist()


class FusedDecoding:
    """Decode steps on a KV cache without a torch operation between their launches.

    Args:
        decoder: weights with folded norms.
        cache: the KV cache; its address must not change.
        use_graphs: record every step as a CUDA graph when it is made for the second time. The first time its launches
            are made one by one, which compiles and loads the kernels.
    """

    def __init__(self, decoder: FusedDecoder, cache: KVCache, *, use_graphs: bool) -> None:
        self.buffers = StepBuffers(decoder, cache, min(cache.slots, MAX_SKINNY_ROWS))
        self.use_graphs = use_graphs
        self._steps: dict[StepKey, FusedStep] = {}
        self._graphs: dict[StepKey, torch.cuda.CUDAGraph] = {}
        self._expected: list[RowState] = []  # what the device is ready for
        self._ahead: StepResult | None = None  # of the expected rows
        self._is_sampled = False  # the steps of the rows that `_start` has written
        self._sums = torch.zeros(self.buffers.rows, device=self.buffers.device)
        self._results = [StepResult(self.buffers.rows, self.buffers.device) for _ in range(2)]

    def logits(self, tokens: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Make a step with tokens (n,) in slots with `lengths` cached tokens each.

        Nothing but tokens is copied if the slots are those of the call before, one token later.

        Returns:
            logits (n, V) float32, which the next step overwrites.
        """
        state: list[RowState] = [(None, slot, length, True) for slot, length in zip(slots, lengths, strict=True)]
        expected, self._expected = self._expected, []  # in case of an error
        if expected != state:
            self._set_state([0] * len(slots), slots, lengths)
        self.buffers.tokens[: len(slots)] = tokens
        with torch.cuda.device_of(self.buffers.stream):
            self._run(len(slots), max(lengths) + 1, False)
        self._expected = _one_token_later(state)
        return self.buffers.logits[: len(slots)]

    def step(self, rows: Sequence[DecodingRow]) -> StepResult:
        """Queue a decode step; if no row needs the host, and all can have one more token, queue the next one, too.

        Nothing is copied to the device if the rows are those of the call before, one token later. If one of them
        needs the host, their tokens are.

        Returns:
            the result, valid until the next call. Where a row needs the host, its token is to be replaced by one that
            is sampled from its logits.
        """
        state: list[RowState] = [(row.sampler, row.slot, row.length, row.sampler.needs_host) for row in rows]
        needs_host = any(hosted for *_, hosted in state)
        expected, self._expected = self._expected, []  # in case of an error
        if expected != state:
            self._start(rows)
        elif needs_host:
            self.buffers.tokens[: len(rows)].copy_(torch.tensor([row.token for row in rows], dtype=torch.int32))
        lengths = [row.length for row in rows]
        result, self._ahead = self._ahead or self._queue(lengths), None
        if not needs_host and all(row.remaining > 1 for row in rows):
            self._ahead = self._queue([length + 1 for length in lengths])
        self._expected = _one_token_later(state)
        return result

    def _start(self, rows: Sequence[DecodingRow]) -> None:
        """Write the rows of the next steps. A step that was queued for others is dropped: it has only written keys and
        values that are written again."""
        self._set_state([row.token for row in rows], [row.slot for row in rows], [row.length for row in rows])
        self._is_sampled = not all(row.sampler.is_greedy or row.sampler.needs_host for row in rows)
        if self._is_sampled:
            write_samplers(self.buffers.sampling, [row.sampler for row in rows], [row.length for row in rows],
                           [row.remaining for row in rows])

    def _queue(self, lengths: Sequence[int]) -> StepResult:
        """Queue a step of the rows that are on the device, with `lengths` cached tokens."""
        count = len(lengths)
        with torch.cuda.device_of(self.buffers.stream):  # Triton and events take the stream of the current device
            self._run(count, max(lengths) + 1, self._is_sampled)
            torch.sum(self.buffers.logits[:count], -1, out=self._sums[:count])
            self._results.reverse()
            result = self._results[0]
            result.fetch(self.buffers.tokens[:count], self._sums[:count])
        result.logits = self.buffers.logits[:count]
        return result

    def _set_state(self, tokens: Sequence[int], slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Write the rows of the next step, those after them as idle."""
        self._ahead = None
        idle = self.buffers.rows - len(slots)
        state = ([*tokens, *[0] * idle], [*slots, *[0] * idle], [*lengths, *[-1] * idle])
        self.buffers.state.copy_(torch.tensor(state, dtype=torch.int32))

    def _run(self, count: int, length: int, is_sampled: bool) -> None:
        key = *self._bucket(count, length), is_sampled
        if key in self._graphs:
            self._graphs[key].replay()
        elif key not in self._steps or not self.use_graphs:
            self._step(key).run()
        else:
            self._graphs[key] = self._captured(self._steps[key])
            self._graphs[key].replay()

    def _captured(self, step: FusedStep) -> torch.cuda.CUDAGraph:
        """Record a step that was made before.

        torch's own stream for captures is of the device where the first one in the process was made, and by default
        another thread that allocates memory makes a capture fail.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(self.buffers.device), capture_error_mode="thread_local"):
            step.run()
        return graph

    def _step(self, key: StepKey) -> FusedStep:
        if key not in self._steps:
            self._steps[key] = _new_step(self.buffers, *key)
        return self._steps[key]

    def _bucket(self, count: int, length: int) -> tuple[int, int]:
        """Rows and length of the step for `count` rows, of which the longest has `length` tokens."""
        longest = SHORTEST
        while longest < length:
            longest *= 2
        rows = next(rows for rows in ROWS if count <= rows)
        return min(rows, self.buffers.rows), min(longest, self.buffers.cache.capacity)


def _one_token_later(state: Sequence[RowState]) -> list[RowState]:
    return [(sampler, slot, length + 1, hosted) for sampler, slot, length, hosted in state]


def decoding_launches(decoder: FusedDecoder, cache: KVCache, rows: int) -> list[Launch]:
    """The launches of decode steps of up to `rows` rows, which use every kernel that such steps need."""
    buffers, length = StepBuffers(decoder, cache, min(rows, MAX_SKINNY_ROWS)), min(SHORTEST, cache.capacity)
    return [launch for most in sorted({min(most, buffers.rows) for most in ROW_BUCKETS})
            for launch in (*_new_step(buffers, most, length, False).launches,
                           *_new_step(buffers, most, length, True).launches[-2:])]  # the others are the same


def _new_step(buffers: StepBuffers, rows: int, length: int, is_sampled: bool) -> FusedStep:
    arch, _ = triton_matmul.device_properties(buffers.device)
    return FusedStep(buffers, rows, length, is_sampled, pdl=PROGRAMMATIC_LAUNCH and arch >= PROGRAMMATIC_CAPABILITY)
