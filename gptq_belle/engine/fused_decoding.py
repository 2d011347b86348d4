"""Fused decode steps on one KV cache: a step for each number of rows and length, recorded as a CUDA graph.

Tokens, slots and lengths stay on the device, and so do parameters and random numbers of sampling. As long as the same
sequences are decoded, a step reads the tokens that the step before has chosen, so the next step can be queued before
the tokens of this one are read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_belle.engine.fused_decoder import FusedDecoder
from gptq_belle.engine.fused_sampling import write_samplers
from gptq_belle.engine.fused_step import FusedStep, StepBuffers
from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.engine.sampling import Sampler
from gptq_belle.kernels import triton_matmul
from gptq_belle.kernels.triton_config import MAX_SKINNY_ROWS, ROW_BUCKETS
from gptq_belle.kernels.triton_launch import Launch

ROWS = (1, 2, 4, 8, 16, 32, 64)  # numbers of rows of a step, rounded up to one of these
SHORTEST = 256  # the smallest length of a step; the others are twice the one before
PROGRAMMATIC_LAUNCH = False  # of every kernel before the one before it ends; not yet seen on a GPU
PROGRAMMATIC_CAPABILITY = 90  # the lowest compute capability that can

StepKey = tuple[int, int, bool]  # rows, length, and whether tokens are sampled


class StepResult:
    """Memory on the host for the next tokens of a step, which are copied while later steps are queued."""

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
        self._is_sampled = False  # the steps of the rows that `start` has written
        self._sums = torch.zeros(self.buffers.rows, device=self.buffers.device)
        self._results = [StepResult(self.buffers.rows, self.buffers.device) for _ in range(2)]

    def logits(self, tokens: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Make a step with tokens (n,) in slots with `lengths` cached tokens each.

        Returns:
            logits (n, V) float32, which the next step overwrites.
        """
        self._set_state([0] * len(slots), slots, lengths)
        self.buffers.tokens[: len(slots)] = tokens
        self._run(len(slots), max(lengths) + 1, False)
        return self.buffers.logits[: len(slots)]

    def start(self, slots: Sequence[int], lengths: Sequence[int], tokens: Sequence[int], samplers: Sequence[Sampler],
              counts: Sequence[int]) -> None:
        """Write the rows of the steps that `queue` queues from now on.

        Args:
            slots, lengths: as for `logits`.
            tokens: input tokens.
            samplers: which do not need the host; they are not changed.
            counts: how many tokens can follow in each row.
        """
        self._set_state(tokens, slots, lengths)
        self._is_sampled = not all(sampler.is_greedy for sampler in samplers)
        if self._is_sampled:
            write_samplers(self.buffers.sampling, samplers, lengths, counts)

    def queue(self, lengths: Sequence[int]) -> StepResult:
        """Queue the first step after `start`, or the next one, without waiting for it.

        Args:
            lengths: number of cached tokens of each row.
        Returns:
            the result, valid until the step after the next one is queued.
        """
        count = len(lengths)
        self._run(count, max(lengths) + 1, self._is_sampled)
        torch.sum(self.buffers.logits[:count], -1, out=self._sums[:count])
        self._results.reverse()
        self._results[0].fetch(self.buffers.tokens[:count], self._sums[:count])
        return self._results[0]

    def _set_state(self, tokens: Sequence[int], slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Write the rows of the next step, those after them as idle."""
        idle = self.buffers.rows - len(slots)
        state = ([*tokens, *[0] * idle], [*slots, *[0] * idle], [*lengths, *[-1] * idle])
        self.buffers.state.copy_(torch.tensor(state, dtype=torch.int32))

    def _run(self, count: int, length: int, is_sampled: bool) -> None:
        key = *self._bucket(count, length), is_sampled
        with torch.cuda.device_of(self.buffers.stream):
            if key in self._graphs:
                self._graphs[key].replay()
            elif key not in self._steps or not self.use_graphs:
                self._step(key).run()
            else:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._steps[key].run()
                graph.replay()
                self._graphs[key] = graph

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


def decoding_launches(decoder: FusedDecoder, cache: KVCache, rows: int) -> list[Launch]:
    """The launches of decode steps of up to `rows` rows, which use every kernel that such steps need."""
    buffers = StepBuffers(decoder, cache, min(rows, MAX_SKINNY_ROWS))
    return [launch for most in sorted({min(most, buffers.rows) for most in ROW_BUCKETS})
            for launch in (*_new_step(buffers, most, SHORTEST, False).launches,
                           *_new_step(buffers, most, SHORTEST, True).launches[-2:])]  # the others are the same


def _new_step(buffers: StepBuffers, rows: int, length: int, is_sampled: bool) -> FusedStep:
    arch, _ = triton_matmul.device_properties(buffers.device)
    return FusedStep(buffers, rows, length, is_sampled, pdl=PROGRAMMATIC_LAUNCH and arch >= PROGRAMMATIC_CAPABILITY)
