"""Many concurrent streams, a third of which disconnect: correct answers, free slots and stable memory."""

import asyncio
import json
import random
import time

import httpx
import pytest
from server_process import serving

PROMPTS = ("写一首关于春天的诗", "你好", "把“早上好”翻译成英文", "1+1等于几？", "用三句话介绍北京", "今天天气怎么样",
           "Hello", "讲个笑话")
LENGTHS = (3, 20, 48)


def body(prompt, length):
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": length, "temperature": 0, "stream": True}


async def streamed(client, fields, most_pieces=None):
    """Text of a stream, or of its first events, after which the client disconnects."""
    text, pieces = "", 0
    async with client.stream("POST", "/v1/chat/completions", json=fields) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            if line == "data: [DONE]":
                return text, True
            event = json.loads(line.removeprefix("data:"))
            assert "error" not in event, event
            text += event["choices"][0]["delta"].get("content", "")
            pieces += 1
            if most_pieces is not None and pieces > most_pieces:
                return text, False
    raise AssertionError(f"a stream broke off after {text!r}")


async def one_client(number, client, expected, end):
    """Send requests until the end; return wrong answers and the number of answers."""
    draw, wrong, answers = random.Random(number), [], 0
    while time.monotonic() < end:
        prompt, length = draw.choice(PROMPTS), draw.choice(LENGTHS)
        hangs_up = draw.randrange(3) == 0
        text, whole = await streamed(client, body(prompt, length), draw.randrange(5) if hangs_up else None)
        right = expected[prompt, length]
        if text != right if whole else not right.startswith(text):
            wrong.append((prompt, length, whole, text))
        answers += 1
    return wrong, answers


async def load(server, clients, seconds):
    """Wrong answers, all answers of each client, and the memory of the server at the half and at the end."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        expected = {(prompt, length): (await streamed(client, body(prompt, length)))[0]
                    for prompt in PROMPTS for length in LENGTHS}
        end = time.monotonic() + seconds
        tasks = [asyncio.create_task(one_client(number, client, expected, end)) for number in range(clients)]
        await asyncio.sleep(seconds / 2)
        half = (await client.get("/health")).json()["memory_bytes"]
        found = await asyncio.gather(*tasks)
        memory = (await client.get("/health")).json()["memory_bytes"]
    return [one for wrong, _ in found for one in wrong], [answers for _, answers in found], half, memory


def check_load(model, log, clients, seconds):
    with serving(model, log, "--max-batch", "8", "--max-queue", str(clients)) as server:
        wrong, answers, half, memory = asyncio.run(load(server, clients, seconds))
        assert wrong == []
        assert min(answers) > 0
        assert memory < 1.03 * half + (4 << 20), (half, memory)
        deadline = time.monotonic() + 5
        while (health := httpx.get(f"{server.url}/health").json())["running"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert health["running"] == health["waiting"] == 0
        metrics = httpx.get(f"{server.url}/metrics").text
    print(f"{clients} clients, {seconds} s: {sum(answers)} answers, {half / 1e6:.0f} and {memory / 1e6:.0f} MB")
    assert 'gptq_belle_requests_total{outcome="cancelled"}' in metrics
    assert 'outcome="failed"' not in metrics


def test_concurrent_streams_with_disconnects(tiny_bloom, tmp_path):
    check_load(tiny_bloom, tmp_path / "log", 12, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_64_streams_for_a_minute(name, tmp_path):
    check_load(f"examples/belle_tiny/{name}", tmp_path / "log", 64, 60)
