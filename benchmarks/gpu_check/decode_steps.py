"""Speed of fused decode steps: as a CUDA graph and launch by launch, with and without programmatic dependent launch.

The variants run in turn on the same KV cache and have to choose the same tokens. Beside them is what the time model
(gptq_belle/bench/step_time.py) calculates with the bandwidth of a copy, measured in the same step.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch

from gptq_belle.common.timers import spread, synchronize
from gpu_check.plan import Step
from gpu_check.setting import Setting

if TYPE_CHECKING:
    from gptq_belle.engine.fused_decoding import FusedDecoding
    from gptq_belle.engine.kv_cache import KVCache
    from gptq_belle.engine.model import Model

REPEATS = 3
GOAL = 0.6  # share of the memory limit, batch 1 and the shortest prompt


class DifferentTokens(Exception):
    """Two variants of the same steps choose different tokens."""


class Variant(NamedTuple):
    """How the launches of a step are made."""

    graph: bool
    dependent_launch: bool  # programmatic dependent launch


PLAIN = (Variant(True, False), Variant(False, False))
DEPENDENT = (Variant(True, False), Variant(True, True), Variant(False, True))


def steps(setting: Setting, model: Path) -> list[Step]:
    """All steps; those with programmatic dependent launch, which may fail on their own, come last."""
    first, longest = setting.sizes.prompts[0], setting.sizes.prompts[-1]
    plain = dict.fromkeys((  # at toy sizes the prompts are equally long
        ("float16", 1, first), ("float16", 8, first), ("float16", 1, longest), ("int8", 1, longest)))
    return [Step(_name(*case, variants), partial(compare, setting, model, *case, variants), 120)
            for variants, cases in ((PLAIN, plain), (DEPENDENT, [("float16", 1, first), ("float16", 8, first)]))
            for case in cases]


def _name(cache: str, batch: int, length: int, variants: Sequence[Variant]) -> str:
    ways = "with and without dependent launch" if variants is DEPENDENT else "graph and eager"
    return f"decode steps, {ways}: batch {batch}, {length} tokens, {cache} cache"


@torch.inference_mode()
def compare(setting: Setting, path: Path, cache_kind: str, batch: int, length: int,
            variants: Sequence[Variant]) -> dict[str, Any]:
    """Tokens per second of each variant, and of the time model.

    Raises:
        DifferentTokens: the variants disagree.
    """
    from gptq_belle.bench.bandwidth import read_bandwidth
    from gptq_belle.bench.gpus import gpu_named, this_gpu
    from gptq_belle.bench.throughput import modelled_step

    model, count = _model(setting, path, cache_kind), setting.sizes.new_tokens
    cache = model.new_cache(batch, length + count)
    _fill(model, cache, length)
    made = {variant: _decoding(setting, model, cache, variant) for variant in variants}
    times: dict[Variant, list[float]] = {variant: [] for variant in variants}
    tokens: list[list[list[int]]] = []
    for repeat in range(2 if setting.toy else REPEATS + 1):  # the first one compiles, and records the graphs
        for variant, decoding in made.items():
            seconds, answers = _timed(model, decoding, variant, length, 2 if setting.toy else count)
            tokens.append(answers)
            if repeat:
                times[variant].append(len(answers) * batch / seconds)
    if any(answers != tokens[0] for answers in tokens):
        raise DifferentTokens("variants of the same decode steps choose different tokens")
    gpu = gpu_named("H200") if setting.toy else this_gpu(setting.device, read_bandwidth(setting.device).median)
    modelled = modelled_step(model, gpu, batch, length + count // 2)
    if modelled is None:
        raise ValueError(f"the time model does not cover this model: {model.unfused_reason(batch)}")
    dependent = modelled.with_dependent_launch()
    return {
        "batch": batch, "length": length, "cache": cache_kind, "copy_Bps": gpu.copy_bandwidth,
        "limit_tps": modelled.limit_tokens_per_second, "modelled_tps": modelled.tokens_per_second,
        "modelled_dependent_launch_tps": None if dependent is None else dependent.tokens_per_second,
        "parts": [part._asdict() for part in modelled.parts],
        "variants": [variant._asdict() | {"tps": asdict(found := spread(times[variant])),
                                          "share_of_limit": found.median / modelled.limit_tokens_per_second}
                     for variant in variants]}


def goal(results: dict[str, Any]) -> dict[str, Any]:
    """The goal of the decode speed, and the best share of the memory limit that a variant reached."""
    shares = [variant["share_of_limit"] for result in results.values() if result.get("batch") == 1
              for variant in result.get("variants", ())]
    return {"goal": "decode step, batch 1, share of the memory limit", "least": GOAL,
            "best": max(shares, default=None)}


def _fill(model: "Model", cache: "KVCache", length: int) -> None:
    """Prefill one slot with token ids and copy it to the others."""
    model.prefill_slot(torch.arange(length, device=model.device) % 100 + 5, cache, 0)
    for slot in range(1, cache.slots):
        cache.copy(0, slot, length)


def _decoding(setting: Setting, model: "Model", cache: "KVCache", variant: Variant) -> "FusedDecoding":
    """Decode steps of a variant, whose kernels are compiled."""
    from gptq_belle.engine import fused_decoding
    from gptq_belle.engine.fused_decoder import fuse
    from gptq_belle.engine.transformers_decoder import TransformersDecoder
    from gptq_belle.kernels.triton_warm_up import compile_launches

    assert not isinstance(model.decoder, TransformersDecoder)
    decoder = fuse(model.decoder)
    with mock.patch.object(fused_decoding, "PROGRAMMATIC_LAUNCH", variant.dependent_launch):
        if not setting.toy:
            compile_launches(fused_decoding.decoding_launches(decoder, cache, cache.slots), model.device)
        return fused_decoding.FusedDecoding(decoder, cache, use_graphs=variant.graph and not setting.toy)


def _timed(model: "Model", decoding: "FusedDecoding", variant: Variant, length: int,
           count: int) -> tuple[float, list[list[int]]]:
    """Seconds of `count` greedy steps, made as the engine makes them, and the tokens of each step."""
    from gptq_belle.engine import fused_decoding
    from gptq_belle.engine.sampling import Sampler, SamplingParams
    from gptq_belle.engine.slots import DecodingRow

    sampler = Sampler(SamplingParams(temperature=0.0), [], model.device)
    tokens, answers = [5] * decoding.buffers.cache.slots, []
    with mock.patch.object(fused_decoding, "PROGRAMMATIC_LAUNCH", variant.dependent_launch):
        synchronize(model.device)
        start = time.perf_counter()
        for step in range(count):
            rows = [DecodingRow(slot, length + step, token, sampler, count - step) for slot, token in enumerate(tokens)]
            tokens = decoding.step(rows).read()[0]
            answers.append(tokens)
    return time.perf_counter() - start, answers


def _model(setting: Setting, path: Path, cache: str) -> "Model":
    """The model on the device; for a toy on a CPU, with weights for the Triton kernels."""
    from gpu_check import models

    if not setting.toy:
        return models.large_model(setting, path, cache)
    from gptq_belle import load
    from gptq_belle.kernels import dispatch

    with mock.patch.object(dispatch, "choose_kernel", return_value=dispatch.KernelChoice("triton", "")):
        return load(path, device="cpu", dtype=torch.float16, head_bits=16, cache=cache)
