"""The work that `bench` times: prompts are prefilled and tokens decoded, by several models in turn."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from gptq_belle.common.timers import synchronize
from gptq_belle.engine.model import Model
from gptq_belle.errors import UsageError

DEFAULT_PROMPT = 512  # tokens


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


def with_prompt_length(workload: Workload, models: Sequence[Model]) -> Workload:
    """The workload with a prompt length that every model's context allows.

    Raises:
        UsageError: prompt and answer do not fit into a model's context.
    """
    for model in models:
        room = DEFAULT_PROMPT + workload.tokens if model.context is None else model.context
        prompt = min(DEFAULT_PROMPT, room - workload.tokens) if workload.prompt is None else workload.prompt
        if prompt < 1 or (model.context is not None and prompt + workload.tokens > model.context):
            raise UsageError(f"{max(prompt, 1) + workload.tokens} tokens do not fit into the context of {model.path}, "
                             f"which is {model.context}", "Choose a smaller -p or -n.")
        workload = replace(workload, prompt=prompt)
    return workload


def run_in_turns(models: Sequence[Model], workload: Workload,
                 progress: Callable[[str], None] = lambda text: None) -> list[list[RunTimes]]:
    """Times by model and repeat. In every repeat all models run in turn, after one short run that is not timed.

    Args:
        models: the loaded models.
        workload: a result of `with_prompt_length`.
        progress: called with a description of each step when it starts.
    """
    for model in models:
        progress(f"warming up {model.path}")
        _run(model, replace(workload, tokens=2))
    times: list[list[RunTimes]] = [[] for _ in models]
    for repeat in range(workload.repeats):
        for model, of_model in zip(models, times, strict=True):
            progress(f"repeat {repeat + 1} of {workload.repeats}: {model.path}")
            of_model.append(_run(model, workload))
    return times


def _run(model: Model, workload: Workload) -> RunTimes:
    """Times of one repeat. Token ids are random, because they do not affect the speed, and eos is ignored."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocabulary_size, (workload.batch, workload.prompt or 1), generator=generator)
    synchronize(model.device)
    start = time.perf_counter()
    logits, cache = model.prefill(ids, workload.tokens)
    tokens = logits.argmax(-1)
    synchronize(model.device)
    middle = time.perf_counter()
    for _ in range(workload.tokens):
        tokens = model.decode(tokens, cache).argmax(-1)
    synchronize(model.device)
    return RunTimes(middle - start, time.perf_counter() - middle)
