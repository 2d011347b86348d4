"""The prefix cache gives a prompt the keys and values of earlier ones, and changes no answer and no seed."""

import inspect
import random
import sys

import pytest
import torch
from conftest import naming, packed_checkpoint
from test_batching import KINDS, alone, finish

from gptq_belle import load
from gptq_belle.engine.batching import Engine
from gptq_belle.engine.prefix_cache import PrefixCache
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.slot_table import SlotTable
from gptq_belle.errors import HardwareError, UsageError
from gptq_belle.models.sizes import QUERY_BLOCK
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.service import Limits, Service


@pytest.fixture(params=["float16", "float32", "int8"])
def model(request, tiny_model, tmp_path):
    return load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cpu", cache=request.param)


def block(model):
    return model.new_cache(1, QUERY_BLOCK)


def with_cache(model, blocks):
    model.prefix_cache = PrefixCache(block(model), blocks * block(model).nbytes)
    return model


def answered(engine, ids, **options):
    request = engine.submit(ids, SamplingParams(**{"max_new_tokens": 1, "ignore_eos": True} | options))
    finish(engine)
    return request


def test_more_chats_than_slots_do_not_evict_each_other(model):
    engine = Engine(with_cache(model, 9), 2)
    chats = [[5 + number] * 140 for number in range(3)]
    reused = [answered(engine, [*ids, turn]).reused for turn in range(3) for ids in chats]
    assert reused == [0, 0, 0] + [128] * 6
    model.prefix_cache = None
    engine = Engine(model, 2)
    assert [answered(engine, [*ids, turn]).reused for turn in range(3) for ids in chats] == [0] * 9


def test_random_chats_get_the_same_answers_with_a_small_cache(model):
    draw = random.Random(5)
    engine, requests = Engine(with_cache(model, 5), 2), []
    stems = [[draw.randrange(4, 384) for _ in range(190)] for _ in range(2)]
    for number in range(14):
        stem = draw.choice(stems)[: draw.choice((64, 100, 128, 190))]
        tail = [draw.randrange(4, 384) for _ in range(draw.choice((0, 1, 40)))]
        params = SamplingParams(max_new_tokens=4, ignore_eos=True, **KINDS[number % len(KINDS)])
        requests.append(engine.submit(stem + tail, params))
        for _ in range(draw.randrange(6)):
            engine.step()
    finish(engine)
    assert sum(request.reused for request in requests) > 500
    assert model.prefix_cache.used_bytes == 5 * block(model).nbytes
    model.prefix_cache = None
    for request in requests:
        assert request.answer == alone(model, request.ids, request.params)


def test_system_prompt_of_requests_that_arrive_together_is_read_once(model, monkeypatch):
    read, prefill = [], model.prefill_slot
    monkeypatch.setattr(model, "prefill_slot", lambda ids, *place: read.append(len(ids)) or prefill(ids, *place))
    engine, system = Engine(with_cache(model, 4), 2), [9] * 128
    requests = [engine.submit([*system, 20 + number], SamplingParams(max_new_tokens=3)) for number in range(7)]
    finish(engine)
    assert sum(read) == 128 + 7
    assert [request.reused for request in requests] == [0] + [128] * 6


def test_least_recently_used_prompt_is_dropped_from_its_end(tiny_llama):
    model = load(tiny_llama, device="cpu", prefix_cache=3 * block(load(tiny_llama, device="cpu")).nbytes)
    cache, stored = model.new_cache(1, 256), model.prefix_cache
    first, second, third = ([token] * 128 for token in (5, 6, 7))
    stored.save(cache, 0, first)
    stored.save(cache, 0, second)  # drops the second block of `first`
    assert [stored.load(cache, 0, ids, 0) for ids in (second, first)] == [128, 64]
    stored.save(cache, 0, third)
    assert [stored.load(cache, 0, ids, 0) for ids in (third, first, second)] == [128, 64, 0]
    stored.save(cache, 0, list(range(256)))
    assert stored.load(cache, 0, list(range(256)), 0) == 192  # all that there is room for
    assert stored.load(cache, 0, list(range(63)), 0) == 0


def test_failed_copy_leaves_the_stored_blocks_right(tiny_llama, monkeypatch):
    model = with_cache(load(tiny_llama, device="cpu"), 2)
    stored, cache = model.prefix_cache, model.new_cache(1, 64)
    for token in (5, 6):
        cache.keys[0].fill_(token)
        stored.save(cache, 0, [token] * 64)
    with monkeypatch.context() as broken:
        broken.setattr(torch, "stack", lambda tables: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stored.save(cache, 0, [7] * 64)
    cache.keys[0].fill_(8)
    stored.save(cache, 0, [8] * 64)
    for token, found in ((5, 0), (6, 64), (8, 64)):
        assert stored.load(cache, 0, [token] * 64, 0) == found
        assert not found or bool((cache.keys[0] == token).all())


def test_generate_reuses_prompts_of_earlier_calls_and_batches(tiny_llama, monkeypatch):
    model = load(tiny_llama, device="cpu", prefix_cache="1MiB")
    plain, prompts = load(tiny_llama, device="cpu"), [[5] * 100, [6] * 100, [7] * 100]
    read, prefill = [], model.prefill_slot
    monkeypatch.setattr(model, "prefill_slot", lambda ids, *place: read.append(len(ids)) or prefill(ids, *place))
    options = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3}
    assert model.generate(prompts, **options) == plain.generate(prompts, **options)
    assert [model.generate(ids, **options) for ids in prompts] == plain.generate(prompts, **options)
    assert read == [100] * 3 + [36] * 3


def test_cache_without_room_for_a_block_or_beyond_the_memory_is_refused(tiny_llama, belle):
    with pytest.raises(UsageError, match=naming(QUERY_BLOCK)):
        load(tiny_llama, device="cpu", prefix_cache=100)
    with pytest.raises(HardwareError):
        load(tiny_llama, device="cpu", prefix_cache="1000T")
    code, _, message = belle("serve", tiny_llama, "--device", "cpu", "--prefix-cache", "2")
    assert (code, "'2'" in message) == (2, True)


def test_metrics_show_the_memory_in_use(tiny_llama):
    metrics = Metrics()
    service = Service(load(tiny_llama, device="cpu", prefix_cache="1MiB"), ["tiny"], Limits(slots=1), metrics)
    service.scheduler.close()
    for token in (5, 6):
        answered(service.engine, [token] * 70)
    assert metrics.registry.get_sample_value("gptq_belle_prefix_cache_bytes") == block(service.model).nbytes


class Fault(Exception):
    """What a statement raises."""


def raise_at(code, line, number):
    """A trace function that raises a Fault when a line runs for the given time, and the list of its runs."""
    times = []

    def trace(frame, event, _):
        if event == "line" and frame.f_lineno == line:
            times.append(line)
            if len(times) == number:
                raise Fault
        return trace if frame.f_code is code else None

    return trace, times


OTHERS = {"__init__", "submit", "cancel", "release", "check_device", "_decode_fused"}
STEPS = [member.__code__ for kind in (Engine, SlotTable, PrefixCache) for name, member in vars(kind).items()
         if inspect.isfunction(member) and name not in OTHERS]
STEPS += [inspect.unwrap(Engine.step).__code__]


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 4])
@pytest.mark.parametrize("code", STEPS, ids=[code.co_qualname for code in STEPS])
def test_fault_at_any_statement_of_a_step_leaves_no_wrong_contents(code, number, tiny_llama):
    model, params = with_cache(load(tiny_llama, device="cpu"), 3), SamplingParams(max_new_tokens=2, ignore_eos=True)
    rows = [[first] * 64 + [second] * 64 + [9] * rest for first, second, rest in (
        (5, 6, 2), (6, 5, 3), (5, 7, 5), (6, 5, 4), (5, 6, 0), (5, 6, 2))]
    expected = [alone(model, ids, params) for ids in rows]
    for line in sorted({line for _, _, line in code.co_lines() if line and line > code.co_firstlineno}):
        engine = Engine(with_cache(model, 3), 2)
        trace, times = raise_at(code, line, number)
        for _ in range(2):  # the second time after the fault
            requests, earlier = [engine.submit(ids, params) for ids in rows], len(times)
            sys.settrace(trace)
            try:
                finish(engine)
            except Fault:  # the scheduler ends all requests
                for request in engine.requests:
                    engine.cancel(request)
            finally:
                sys.settrace(None)
            if not earlier < number <= len(times):
                assert [request.answer for request in requests] == expected, line
