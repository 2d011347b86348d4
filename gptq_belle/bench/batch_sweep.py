"""Prefill and decode speed by batch size and depth (the number of tokens already in the KV cache)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from gptq_belle.bench.workload import RunTimes
from gptq_belle.common.timers import Spread, spread, synchronize
from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.engine.model import Model
from gptq_belle.errors import UsageError


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """Speeds of one model at one batch size and depth, in tokens per second of the whole batch.

    Attributes:
        path: the model's directory.
        batch: number of sequences.
        depth: tokens of each sequence in the KV cache before the prompt.
        prefill: speed of prefill, one sequence after another as in the engine.
        decode: speed of the decode steps after it.
    """

    path: Path
    batch: int
    depth: int
    prefill: Spread
    decode: Spread


def check_context(models: Sequence[Model], depths: Sequence[int], prompt: int, tokens: int) -> None:
    """Raise UsageError if the measurement at the largest depth does not fit into a model's context."""
    if any(depth < 0 for depth in depths):
        raise UsageError(f"depth {min(depths)} is not allowed", "Depths are 0 or more, such as 0,512,2048.")
    for model in models:
        if model.context is not None and max(depths, default=0) + prompt + tokens > model.context:
            raise UsageError(f"{prompt} + {tokens} tokens after {max(depths)} do not fit into the context of "
                             f"{model.path}, which is {model.context}", "Choose a smaller -d, -p or -n.")


def sweep(models: Sequence[Model], batches: Sequence[int], depths: Sequence[int], prompt: int, tokens: int,
          repeats: int, progress: Callable[[str], None] = lambda text: None) -> list[SweepPoint]:
    """Measure all models at every batch size and depth; in every repeat they run in turn.

    Args:
        models: the loaded models.
        batches, depths: all combinations are measured; see `check_context`.
        prompt, tokens: number of prefilled and of decoded tokens.
        repeats: number of timed repeats, after one that is not timed.
        progress: called with a description of each step when it starts.
    """
    points = []
    for batch, depth in product(batches, depths):
        progress(f"batch {batch}, depth {depth}")
        caches = [_filled_cache(model, batch, depth, depth + prompt + tokens) for model in models]
        times: list[list[RunTimes]] = [[] for _ in models]
        for _ in range(repeats + 1):
            for model, cache, found in zip(models, caches, times, strict=True):
                found.append(_run(model, cache, depth, prompt, tokens))
        points += [SweepPoint(model.path, batch, depth, spread([batch * prompt / run.prefill for run in found[1:]]),
                              spread([batch * tokens / run.decode for run in found[1:]]))
                   for model, found in zip(models, times, strict=True)]
    return points


@torch.inference_mode()
def _filled_cache(model: Model, batch: int, depth: int, capacity: int) -> KVCache:
    """A KV cache with `depth` tokens in each slot: one slot is prefilled and copied to the others."""
    cache = model.new_cache(batch, capacity)
    if depth:
        model.prefill_slot(_random_ids(model, depth), cache, 0)
        for slot in range(1, batch):
            cache.copy(0, slot, depth)
    return cache


@torch.inference_mode()
def _run(model: Model, cache: KVCache, depth: int, prompt: int, tokens: int) -> RunTimes:
    """Times of one repeat; overwrites the tokens of earlier runs after `depth`."""
    slots, ids = list(range(cache.slots)), _random_ids(model, prompt)
    synchronize(model.device)
    start = time.perf_counter()
    logits = torch.cat([model.prefill_slot(ids, cache, slot, depth) for slot in slots])
    synchronize(model.device)
    middle = time.perf_counter()
    for step in range(tokens):
        logits = model.decode_slots(logits.argmax(-1), cache, slots, [depth + prompt + step] * len(slots))
    synchronize(model.device)
    return RunTimes(middle - start, time.perf_counter() - middle)


def _random_ids(model: Model, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocabulary_size, (count,), generator=generator).to(model.device)
