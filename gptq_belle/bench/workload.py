"""The work that `bench` times, by several models in turn: prompts are prefilled and tokens decoded, also after tokens
that are already in the KV cache (depth)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from gptq_belle.common.timers import Spread, spread, synchronize
from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.engine.model import Model
from gptq_belle.errors import UsageError

DEFAULT_PROMPT = 512  # tokens
Progress = Callable[[str], None]  # called with a description of each step when it starts


@dataclass(frozen=True, slots=True)
class Workload:
    """Work of every model in a repeat: prefill `batch` prompts of `prompt` tokens, then decode `tokens` each.

    A prompt of None has 512 tokens, or as many as the context allows.
    """

    prompt: int | None = None
    tokens: int = 128
    batch: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is not allowed", "It must be 1 or more.")


class RunTimes(NamedTuple):
    """Times of one repeat in seconds."""

    prefill: float  # from the prompt to the first token
    decode: float  # of all further tokens


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """Speeds of one model at one batch size and depth, in tokens per second of the whole batch."""

    path: Path
    batch: int
    depth: int  # tokens of each sequence in the KV cache before the prompt
    prefill: Spread  # speed of prefill, one sequence after another as in the engine
    decode: Spread  # speed of the decode steps after it


def with_prompt_length(workload: Workload, models: Sequence[Model], depth: int = 0) -> Workload:
    """The workload with a prompt length that every model's context allows after `depth` tokens.

    Raises:
        UsageError: prompt and answer do not fit into a model's context.
    """
    for model in models:
        others = depth + workload.tokens
        room = DEFAULT_PROMPT + others if model.context is None else model.context
        prompt = min(DEFAULT_PROMPT, room - others) if workload.prompt is None else workload.prompt
        if prompt < 1 or (model.context is not None and prompt + others > model.context):
            cached = f", {depth} of them in the KV cache," if depth else ""
            raise UsageError(f"{max(prompt, 1) + others} tokens{cached} do not fit into the context of {model.path}, "
                             f"which is {model.context}", "Choose a smaller -d, -p or -n.")
        workload = replace(workload, prompt=prompt)
    return workload


def sweep(models: Sequence[Model], workload: Workload, batches: Sequence[int], depths: Sequence[int],
          progress: Progress = lambda text: None) -> list[SweepPoint]:
    """Measure all models at every batch size and depth; arguments as for `run_in_turns`."""
    points = []
    for batch, depth in product(batches, depths):
        work = replace(workload, batch=batch)
        points += [SweepPoint(model.path, batch, depth,
                              spread([batch * (work.prompt or 1) / run.prefill for run in times]),
                              spread([batch * work.tokens / run.decode for run in times]))
                   for model, times in zip(models, run_in_turns(models, work, progress, depth), strict=True)]
    return points


@torch.inference_mode()
def run_in_turns(models: Sequence[Model], workload: Workload, progress: Progress = lambda text: None,
                 depth: int = 0) -> list[list[RunTimes]]:
    """Times by model and repeat. In every repeat all models run in turn, after one short run that is not timed.

    Args:
        workload: a result of `with_prompt_length`.
        depth: tokens of each sequence in the KV cache before the prompt.
    """
    where = f"batch {workload.batch}, depth {depth}"
    caches = []
    for model in models:
        progress(f"warming up {model.path}, {where}")
        caches.append(_filled_cache(model, workload.batch, depth, depth + (workload.prompt or 1) + workload.tokens))
        _run(model, caches[-1], replace(workload, tokens=1), depth)
    times: list[list[RunTimes]] = [[] for _ in models]
    for repeat in range(workload.repeats):
        for model, cache, of_model in zip(models, caches, times, strict=True):
            progress(f"repeat {repeat + 1} of {workload.repeats}, {where}: {model.path}")
            of_model.append(_run(model, cache, workload, depth))
    return times


def _filled_cache(model: Model, batch: int, depth: int, capacity: int) -> KVCache:
    """A KV cache with `depth` tokens in each slot: one slot is prefilled and copied to the others."""
    cache = model.new_cache(batch, capacity)
    if depth:
        model.prefill_slot(_random_ids(model, depth), cache, 0)
        for slot in range(1, batch):
            cache.copy(0, slot, depth)
    return cache


def _run(model: Model, cache: KVCache, workload: Workload, depth: int) -> RunTimes:
    """Times of one repeat, which overwrites what earlier ones cached after `depth`; eos is ignored."""
    slots, ids = list(range(cache.slots)), _random_ids(model, workload.prompt or 1)
    synchronize(model.device)
    start = time.perf_counter()
    tokens = torch.cat([model.prefill_slot(ids, cache, slot, depth) for slot in slots]).argmax(-1)
    synchronize(model.device)
    middle = time.perf_counter()
    for step in range(workload.tokens):
        tokens = model.decode_slots(tokens, cache, slots, [depth + len(ids) + step] * len(slots)).argmax(-1)
    synchronize(model.device)
    return RunTimes(middle - start, time.perf_counter() - middle)


def _random_ids(model: Model, count: int) -> torch.Tensor:
    """Token ids (count,), random because they do not affect the speed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocabulary_size, (count,), generator=generator).to(model.device)
