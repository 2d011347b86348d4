"""Nothing that a client sends stops the event loop, on which the streams of all other clients depend."""

import asyncio
import json
import time

import httpx
import pytest
import torch

from gptq_belle import load
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.serving.api_errors import ApiError
from gptq_belle.serving.app import create_app
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.request_guard import MAX_VALUES, Access
from gptq_belle.serving.service import Limits, Service

LONGEST = 1.5  # seconds; the bodies below took 5 to 10 s before their lists had limits
MESSAGE = '{"role":"user","content":"x"}'


@pytest.fixture(scope="module")
def service(tiny_bloom):
    service = Service(load(tiny_bloom, device="cpu"), ["tiny"], Limits(), Metrics())
    yield service
    service.scheduler.close()


async def longest_pause(work):
    """The result of a coroutine, and the longest time in seconds that the event loop did nothing else meanwhile."""
    task, longest = asyncio.create_task(work), 0.0
    while not task.done():
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - start)
    return task.result(), longest


def array(element):
    return "[" + ",".join([element] * (MAX_VALUES // (element.count(",") + 1) - 8)) + "]"


@pytest.mark.parametrize(("path", "body", "status"), [
    ("chat/completions", f'{{"messages":{array(MESSAGE)}}}', 400),
    ("chat/completions", f'{{"messages":{array("1")}}}', 400),
    ("chat/completions", f'{{"messages":[{{"role":"user","content":{array("1")}}}]}}', 400),
    ("chat/completions", f'{{"messages":[{MESSAGE}],"stop_token_ids":{array("-5")}}}', 400),
    ("chat/completions", f'{{"messages":[{MESSAGE}],"stop":{array("5")}}}', 400),
    ("completions", f'{{"prompt":{array("-5")}}}', 400), ("completions", f'{{"prompt":[{array("-5")}]}}', 400),
    ("completions", f'{{"prompt":{array("[]")}}}', 400), ("completions", f'{{"prompt":{array("5")}}}', 400),
    ("completions", '{"prompt":"x","logit_bias":{' + ",".join(f'"{i}":200' for i in range(100_000)) + "}}", 400),
    ("completions", '{"prompt":"x",' + ",".join(f'"x{i}":1' for i in range(100_000)) + "}", 400),
    ("completions", json.dumps({"prompt": "x" * 4_000_000}), 400), ("completions", array("5") + array("5"), 413)])
def test_large_bodies_are_refused_quickly(service, path, body, status):
    app = create_app(lambda state: service, Limits(), Access(local_only=False), load_first=True)
    app.state.server.service = service

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})

    response, pause = asyncio.run(longest_pause(send()))
    assert response.status_code == status, response.text
    assert len(response.text) < 2000
    assert pause < LONGEST


def test_tokenization_does_not_stop_the_event_loop(service, monkeypatch):
    monkeypatch.setattr(service, "context", None)
    text = "人工智能正在改变我们的生活 " * 40_000
    ids, pause = asyncio.run(longest_pause(service.encode(text)))
    assert len(ids) > 40_000
    assert pause < 0.3


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(service, monkeypatch):
    monkeypatch.setattr(service, "tokenizer", None)
    longest = max(map(len, service.model.tokenizer.get_vocab()))
    with pytest.raises(ApiError) as refused:
        asyncio.run(service.encode("x" * (256 * longest + 1)))
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")


def test_scored_prompt_lets_the_steps_of_others_run_between_its_chunks(service, monkeypatch):
    monkeypatch.setattr(type(service.model), "prefill_chunk", 16)
    order, ids = [], list(range(5, 105))
    step, run = service.engine.step, service.model.logprob_chunks
    monkeypatch.setattr(service.engine, "step", lambda: order.append("step") or step())

    def chunks(*arguments):
        for chunk in run(*arguments):
            order.append("chunk")
            yield chunk

    monkeypatch.setattr(service.model, "logprob_chunks", chunks)

    async def both():
        [answer] = service.scheduler.submit([([5, 6], SamplingParams(max_new_tokens=60, ignore_eos=True))])
        await answer.arrived.get()
        found = await asyncio.gather(service.score(ids, 1), service.score(ids, 1))
        answer.cancel()
        return found

    found = asyncio.run(both())
    first, last = order.index("chunk"), len(order) - order[::-1].index("chunk")
    assert order[first:last].count("chunk") == 14
    assert "chunk,chunk" not in ",".join(order[first:last])
    expected = service.model.logits(torch.tensor([ids]))[0].double().log_softmax(-1)
    for scored in found:
        assert [logprob for logprob, _ in scored] == pytest.approx(
            [float(expected[place, token]) for place, token in enumerate(ids[1:])], abs=1e-4)
        assert [likely[0][0] for _, likely in scored] == expected[:-1].argmax(-1).tolist()
