"""Speed over batches and depths: prefill and decode behind so many tokens that are read already."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from gptq_belle.common.timers import Spread, spread, synchronize
from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.engine.model import Model
from gptq_belle.errors import UsageError


@dataclass(frozen=True, slots=True)
class Point:
    """One model at one batch and depth; speeds in tokens per second, all rows together.

    Attributes:
        path: the model's directory.
        batch: rows.
        depth: tokens of each row that are in the cache before anything is timed.
        prefill: of the prompt behind them, row by row as the engine reads.
        decode: of tokens behind that.
    """

    path: Path
    batch: int
    depth: int
    prefill: Spread
    decode: Spread


def check_room(models: Sequence[Model], depths: Sequence[int], prompt: int, tokens: int) -> None:
    """Raises UsageError where the deepest measurement does not fit into a model's context."""
    if any(depth < 0 for depth in depths):
        raise UsageError(f"depth {min(depths)} is not allowed", "Depths are 0 or more, such as 0,512,2048.")
    for model in models:
        if model.context is not None and max(depths, default=0) + prompt + tokens > model.context:
            raise UsageError(f"{prompt} + {tokens} tokens behind {max(depths)} do not fit into the context of "
                             f"{model.path}, which is {model.context}", "Choose a smaller -d, -p or -n.")


def sweep(models: Sequence[Model], batches: Sequence[int], depths: Sequence[int], prompt: int, tokens: int,
          repeats: int, progress: Callable[[str], None] = lambda text: None) -> list[Point]:
    """Measure every model at every batch and depth, in turn, repeat by repeat.

    Args:
        models: loaded; see `check_room`.
        batches, depths: to be measured; every pairing.
        prompt, tokens: of what is timed.
        repeats: how often; one more before them does not count.
        progress: told what begins.
    """
    points = []
    for batch, depth in product(batches, depths):
        progress(f"batch {batch}, behind {depth} tokens")
        caches = [_filled(model, batch, depth, depth + prompt + tokens) for model in models]
        times: list[list[tuple[float, float]]] = [[] for _ in models]
        for _ in range(repeats + 1):
            for model, cache, found in zip(models, caches, times, strict=True):
                found.append(_run(model, cache, depth, prompt, tokens))
        points += [Point(model.path, batch, depth, spread([batch * prompt / p for p, _ in found[1:]]),
                         spread([batch * tokens / d for _, d in found[1:]]))
                   for model, found in zip(models, times, strict=True)]
    return points


@torch.inference_mode()
def _filled(model: Model, batch: int, depth: int, capacity: int) -> KVCache:
    """A cache whose slots hold `depth` tokens each. One row is read, and copied to the others."""
    cache = model.new_cache(batch, capacity)
    if depth:
        model.prefill_slot(_ids(model, depth), cache, 0)
        for slot in range(1, batch):
            cache.copy(0, slot, depth)
    return cache


@torch.inference_mode()
def _run(model: Model, cache: KVCache, depth: int, prompt: int, tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of decoding; what an earlier run left behind `depth` is written over."""
    slots, ids = list(range(cache.slots)), _ids(model, prompt)
    synchronize(model.device)
    began = time.perf_counter()
    logits = torch.cat([model.prefill_slot(ids, cache, slot, depth) for slot in slots])
    synchronize(model.device)
    middle = time.perf_counter()
    for step in range(tokens):
        logits = model.decode_slots(logits.argmax(-1), cache, slots, [depth + prompt + step] * len(slots))
    synchronize(model.device)
    return middle - began, time.perf_counter() - middle


def _ids(model: Model, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocabulary_size, (count,), generator=generator).to(model.device)
