"""Continuous batching: the answer to a request is bit-identical to its answer alone, whatever else is running."""

import random

import pytest
import torch
from conftest import naming, packed_checkpoint

from gptq_belle import load
from gptq_belle.engine.batching import Engine
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.errors import HardwareError, UsageError

KINDS = [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 6},
         {"repetition_penalty": 1.3}, {"temperature": 0.7, "repetition_penalty": 1.1, "seed": 7}]


@pytest.fixture(params=["float16", "float32", "int8"])
def model(request, tiny_model, tmp_path):
    return load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cpu", cache=request.param)


def prompts(count, longest=150):
    generator = random.Random(11)
    return [[generator.randrange(4, 384) for _ in range(generator.randrange(1, longest))] for _ in range(count)]


def finish(engine):
    while not engine.idle:
        engine.step()


def alone(model, ids, params):
    engine = Engine(model, 1)
    request = engine.submit(ids, params)
    finish(engine)
    return request.answer


def test_batched_answers_equal_single_answers(model):
    rows = [(ids, SamplingParams(max_new_tokens=12 + 3 * (i % 4), ignore_eos=i % 2 == 0, **KINDS[i % len(KINDS)]))
            for i, ids in enumerate(prompts(12))]
    engine, requests = Engine(model, 4), []
    for i, (ids, params) in enumerate(rows):  # they come while others are being answered
        requests.append(engine.submit(ids, params))
        for _ in range(i % 5):
            engine.step()
    finish(engine)
    assert [request.answer for request in requests] == [alone(model, ids, params) for ids, params in rows]
    assert all(request.finished in ("stop", "length") for request in requests)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_logits_of_a_row_are_bit_identical_in_a_batch(model, threads):
    torch.set_num_threads(threads)
    try:
        rows = prompts(9, 40)
        with torch.inference_mode():
            together, single = model.new_cache(9, 60), model.new_cache(1, 50)  # another capacity
            for slot, ids in enumerate(rows):
                model.prefill_slot(torch.tensor(ids), together, slot)
            tokens = torch.tensor([ids[0] for ids in rows])
            found = model.decode_slots(tokens, together, range(9), [len(ids) for ids in rows])
            for slot, ids in enumerate(rows):
                model.prefill_slot(torch.tensor(ids), single, 0)
                assert torch.equal(model.decode_slots(tokens[slot : slot + 1], single, [0], [len(ids)])[0], found[slot])
    finally:
        torch.set_num_threads(1)


def test_shared_prefixes_are_not_prefilled_again(model, monkeypatch):
    read, lengths = model.prefill_slot, []
    monkeypatch.setattr(model, "prefill_slot", lambda ids, *where: lengths.append(len(ids)) or read(ids, *where))
    ids, params = torch.randint(4, 384, (150,)).tolist(), SamplingParams(max_new_tokens=5, ignore_eos=True)
    engine = Engine(model, 3)
    first = engine.submit(ids, params)
    finish(engine)
    turns = [ids + first.answer + [9, 9, 9], ids[:100], [7] * 30, ids]
    for turn, reused in zip(turns, (128, 64, 0, 128), strict=True):
        lengths.clear()
        request = engine.submit(turn, params)
        finish(engine)
        assert (request.reused, sum(lengths)) == (reused, len(turn) - reused)
        assert request.answer == alone(model, turn, params)


def test_long_prompt_is_read_before_younger_ones_in_lower_slots(model, monkeypatch):
    monkeypatch.setattr(type(model), "prefill_chunk", 32)
    engine, params = Engine(model, 3), SamplingParams(max_new_tokens=1, ignore_eos=True)
    holders = [engine.submit([5 + i] * 3, SamplingParams(max_new_tokens=50, ignore_eos=True)) for i in range(2)]
    while not all(holder.answer for holder in holders):
        engine.step()
    long = engine.submit(prompts(1, 2)[0] * 200, params)
    engine.step()
    for holder in holders:
        engine.cancel(holder)
    younger = []
    for step in range(6):  # 200 tokens are 7 chunks
        younger.append(engine.submit([20 + step] * 40, params))
        engine.step()
    assert len(long.answer) == 1
    assert not any(request.answer for request in younger)
    finish(engine)
    assert all(len(request.answer) == 1 for request in younger)


def test_prompts_are_read_in_the_order_of_their_submission(model, monkeypatch):
    monkeypatch.setattr(type(model), "prefill_chunk", 32)
    engine, params = Engine(model, 3), SamplingParams(max_new_tokens=1, ignore_eos=True)
    requests = [engine.submit([9 + number] * length, params) for number, length in enumerate((30, 100, 70, 5, 90, 10))]
    ended = []
    while not engine.idle:
        ended += [event.request for event in engine.step()]
    assert ended == requests


def answered(engine, ids, tokens=1):
    request = engine.submit(ids, SamplingParams(max_new_tokens=tokens, ignore_eos=True))
    finish(engine)
    return request


@pytest.mark.parametrize("shared", [0, 64], ids=["different beginnings", "same first block"])
@pytest.mark.parametrize("stale", [70, 200])
def test_alternating_chats_find_their_earlier_turns_beside_unused_prompts(model, shared, stale):
    engine, generator = Engine(model, 4), random.Random(3)

    def text(count):
        return [generator.randrange(4, 384) for _ in range(count)]

    for _ in range(3):
        answered(engine, text(stale))
    beginning = text(shared)
    chats, reused = [beginning + text(130 - shared) for _ in range(2)], []
    for _ in range(3):
        for number, ids in enumerate(chats):
            reused.append(answered(engine, ids, tokens=9).reused)
            chats[number] = ids + text(10)
    assert reused == [0, shared, 128, 128, 128, 128]


def test_prompt_too_short_to_be_reused_evicts_no_chat(model):
    engine, chat = Engine(model, 2), prompts(1, 2)[0] * 130
    answered(engine, chat)
    for token in range(30, 34):
        assert answered(engine, [token] * 20).reused == 0
    assert answered(engine, [*chat, 8, 8]).reused == 128


def test_edited_last_turn_keeps_the_earlier_version(model):
    engine, chat = Engine(model, 2), [7] * 64 + [8] * 100
    answered(engine, chat)
    assert answered(engine, chat[:64] + [9] * 100).reused == 64
    assert answered(engine, [*chat, 5]).reused == 128


def test_cancelled_request_frees_its_slot(model):
    engine, params = Engine(model, 1), SamplingParams(max_new_tokens=9, ignore_eos=True)
    first, second, third = (engine.submit(ids, params) for ids in prompts(3))
    engine.step()
    assert engine.requests == [first, second, third]
    engine.cancel(second)
    engine.cancel(first)
    assert (first.finished, second.finished) == ("cancelled", "cancelled")
    assert len(first.answer) == 1
    finish(engine)
    engine.cancel(third)
    assert (third.finished, len(third.answer), engine.idle) == ("length", 9, True)


def test_events_report_every_token_and_the_finish_reason(model):
    engine, params = Engine(model, 3), SamplingParams(max_new_tokens=4, ignore_eos=True)
    requests = [engine.submit(ids, params) for ids in prompts(5, 20)]
    events = []
    while not engine.idle:
        events += engine.step()
    for request in requests:
        mine = [event for event in events if event.request is request]
        assert [event.token for event in mine] == request.answer
        assert [event.finished for event in mine] == [None, None, None, "length"]


def test_same_prompt_is_read_once_and_a_shared_prefix_too(model):
    read, prefill = [], model.prefill_slot
    model.prefill_slot = lambda ids, *place: read.append(len(ids)) or prefill(ids, *place)
    long, params = prompts(1)[0] * 200, [SamplingParams(max_new_tokens=5, temperature=1.0, seed=s) for s in range(6)]
    same, forked = long[:150], [*long[:130], 7]
    engine = Engine(model, 5)
    requests = [engine.submit(ids, each) for ids, each in zip([same, same, forked, same], params, strict=False)]
    finish(engine)
    assert sum(read) == len(same) + len(forked) - 128  # whole blocks of queries are shared
    assert [request.reused for request in requests] == [0, 150, 128, 150]
    del model.prefill_slot
    assert [request.answer for request in requests] == [
        alone(model, request.ids, each) for request, each in zip(requests, params, strict=False)]
    later = engine.submit(same, params[4])
    finish(engine)
    assert (later.reused, later.answer) == (128, alone(model, same, params[4]))


def test_stop_tokens_end_a_request_but_not_before_its_minimum(model):
    ids, free = prompts(1)[0], {"max_new_tokens": 20, "ignore_eos": True}
    answer = alone(model, ids, SamplingParams(**free))
    engine, end = Engine(model, 2), answer[3]
    stopped = engine.submit(ids, SamplingParams(**free, stop_token_ids=(end,)))
    longer = engine.submit(ids, SamplingParams(**free, stop_token_ids=(end,), min_tokens=12))
    finish(engine)
    assert (stopped.answer, stopped.end, stopped.finished) == (answer[: answer.index(end)], end, "stop")
    assert end not in longer.answer[:12]
    assert len(longer.answer) >= 12


@pytest.mark.parametrize("option", [{"logit_bias": {384: 1.0}}, {"stop_token_ids": (5, 384)}])
def test_token_ids_of_options_beyond_the_vocabulary_are_refused(model, option):
    with pytest.raises(UsageError, match=naming(*option, 384)):
        Engine(model, 1).submit([5], SamplingParams(**option))


def test_eos_ends_a_request(model):
    ids, params = prompts(1)[0], SamplingParams(max_new_tokens=20, ignore_eos=True)
    answer = alone(model, ids, params)
    model.eos_ids = frozenset({answer[3]})
    engine = Engine(model, 1)
    request = engine.submit(ids, SamplingParams(max_new_tokens=20))
    events = []
    while not engine.idle:
        events += engine.step()
    assert (request.answer, request.finished) == (answer[: answer.index(answer[3])], "stop")
    assert events[-1][:3] == (request, None, "stop")


@pytest.mark.parametrize(("ids", "count", "figures"), [
    ([5] * 100, 1, [100, 1]), ([5] * 100, None, [100]), ([5] * 90, 11, [90, 11, 100]), ([], 1, [(1, 0)]),
    ([384], 1, ["384..384"]), ([5] * 300, 1, [300, 256])])
def test_prompt_beyond_the_capacity_is_refused_on_submit(model, ids, count, figures):
    engine = Engine(model, 1, capacity=100)
    with pytest.raises(UsageError, match=naming(*figures)):
        engine.submit(ids, SamplingParams(max_new_tokens=count))
    assert engine.idle


def test_too_many_slots_for_the_memory_are_refused(model):
    with pytest.raises(HardwareError, match=naming(10**9, 256)):
        Engine(model, 10**9)
