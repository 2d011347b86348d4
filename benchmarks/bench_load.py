"""Measure a server under load: streams that hang up, hostile clients, and many short requests.

    python benchmarks/bench_load.py examples/belle_tiny/bloom examples/belle_tiny/llama

First, 64 streams run at a time, a third of which hang up, beside a client that sends 1 MB prompts, one that leaves
connections half open, and one that has long prompts scored. Then 20,000 short requests. Gaps between the tokens of a
stream are counted in steps of the engine at the moment when the server sends them, so that they do not depend on what
else the machine runs. Memory is compared between the half and the end, descriptors between the start and the end.
Results are written to benchmarks/results/load.json.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import psutil
import records

sys.path.insert(0, str(records.ROOT / "tests"))
from server_process import serving  # noqa: E402

# A server that counts its steps, and at exit writes the gaps between tokens of a stream in steps, with their frequency.
SERVER = """
import collections, json, sys
from gptq_belle.cli import main
from gptq_belle.engine.batching import Engine
from gptq_belle.serving.completion_choice import CompletionChoice
steps, gaps, file = 0, collections.Counter(), sys.argv.pop()
def step(self, plain=Engine.step):
    global steps
    steps += 1
    return plain(self)
def feed(self, item, plain=CompletionChoice.feed):
    if not isinstance(item, str):
        if self.count:
            gaps[steps - self.step] += 1
        self.step = steps
    return plain(self, item)
Engine.step, CompletionChoice.feed = step, feed
try:
    main()
finally:
    json.dump({"steps": steps, "gaps": gaps}, open(file, "w"))
"""
PROMPTS = ("写一首关于春天的诗", "你好", "把“早上好”翻译成英文", "用三句话介绍北京")
SYSTEM = "你是一个乐于助人的中文助手，回答简洁、准确。" * 4
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


class Client:
    """Requests to one server over raw connections, because the clients share the cores with it."""

    def __init__(self, url: str) -> None:
        self.place: SplitResult = urlsplit(url)
        self.counts = {"streams": 0, "hung_up": 0, "failed_streams": 0, "large_prompts": 0, "half_open": 0, "scored": 0}

    async def post(self, path: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
        """Send a request; returns the connection after the head of the response, and its status."""
        reader, writer = await asyncio.open_connection(self.place.hostname, self.place.port, limit=1 << 24)
        data = json.dumps(body).encode()
        writer.write(f"POST {path} HTTP/1.1\r\nHost: {self.place.netloc}\r\nContent-Type: application/json\r\n"
                     f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        head = await reader.readuntil(b"\r\n\r\n")
        return reader, writer, int(head.split()[1])

    async def whole(self, path: str, body: dict[str, Any]) -> int:
        """Send a request and read its response; returns the status."""
        reader, writer, status = await self.post(path, body)
        await reader.read()
        writer.close()
        return status

    async def streams(self, number: int, end: float) -> None:
        """One stream after the other; of a third of them, only the beginning is read."""
        draw = random.Random(number)
        while time.monotonic() < end:
            messages = [{"role": "system", "content": SYSTEM}] * draw.randrange(2)
            body = {"messages": [*messages, {"role": "user", "content": draw.choice(PROMPTS)}], "stream": True,
                    "max_tokens": draw.choice((20, 80, 200)), "ignore_eos": True}
            reader, writer, status = await self.post("/v1/chat/completions", body)
            if draw.randrange(3) == 0:
                await reader.readuntil(b"\n\n")
                self.counts["hung_up"] += 1
            else:
                text = await reader.read()
                self.counts["failed_streams"] += status != 200 or b"[DONE]" not in text or b'"error"' in text
            self.counts["streams"] += 1
            writer.close()

    async def large_prompts(self, end: float) -> None:
        """Prompts of 1 MB, and some of the largest size that is tokenized before it is refused."""
        while time.monotonic() < end:
            for text in ("春天" * 170_000, "春天 " * 1_800):
                assert await self.whole("/v1/completions", {"prompt": text, "max_tokens": 1}) == 400
                self.counts["large_prompts"] += 1

    async def half_open(self, end: float) -> None:
        """Connections that send a part of a request and nothing more."""
        while time.monotonic() < end:
            opened = [await asyncio.open_connection(self.place.hostname, self.place.port) for _ in range(20)]
            for _, writer in opened:
                writer.write(HEAD)
            await asyncio.sleep(2)
            for _, writer in opened[::2]:  # the server has to close the others
                writer.close()
            self.counts["half_open"] += len(opened)

    async def scoring(self, end: float) -> None:
        """Long prompts whose tokens are scored."""
        while time.monotonic() < end:
            body = {"prompt": "今天天气很好，" * 60, "max_tokens": 0, "echo": True, "logprobs": 1}
            assert await self.whole("/v1/completions", body) == 200
            self.counts["scored"] += 1

    async def short(self, count: int, clients: int) -> None:
        """Requests with one token each, on a connection of their own."""
        async def some(part: int) -> None:
            for _ in range(part):
                assert await self.whole("/v1/completions", {"prompt": "你好", "max_tokens": 1}) == 200

        await asyncio.gather(*[some(count // clients) for _ in range(clients)])


async def load(url: str, process: psutil.Process, seconds: float, streams: int, requests: int) -> dict[str, Any]:
    """Run both parts."""
    client = Client(url)
    await client.short(200, 8)
    descriptors, end = process.num_fds(), time.monotonic() + seconds
    tasks = [asyncio.create_task(work) for work in (
        *[client.streams(number, end) for number in range(streams)], client.large_prompts(end), client.half_open(end),
        client.scoring(end))]
    await asyncio.sleep(seconds / 2)
    half = process.memory_info().rss
    await asyncio.gather(*tasks)
    memory = [process.memory_info().rss]
    for _ in range(4):
        await client.short(requests // 4, 16)
        memory.append(process.memory_info().rss)
    await asyncio.sleep(12)  # half-open connections are closed after 10 s
    return {**client.counts, "requests": requests, "descriptors": [descriptors, process.num_fds()],
            "megabytes": [round(size / 1e6) for size in (half, *memory)]}


def measure(path: str, seconds: float, streams: int, requests: int) -> dict[str, Any]:
    """Load a server of one model."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.json"
        program = ("-c", SERVER)
        options = ("--max-batch", str(streams), "--prefix-cache", "16MiB", str(file))
        with serving(Path(path), Path(folder) / "log", *options, program=program) as server:
            found = asyncio.run(load(server.url, psutil.Process(server.process.pid), seconds, streams, requests))
            code = server.end()
        steps = json.loads(file.read_text())
        log = server.log
    gaps = dict(sorted((int(gap), count) for gap, count in steps["gaps"].items()))
    return {"model": Path(path).name, **found, "steps": steps["steps"], "tokens": sum(gaps.values()),
            "longest_gap_in_steps": max(gaps), "gaps_in_steps": gaps, "tracebacks": log.count("Traceback"),
            "exit": code}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="+", help="model directories")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=20_000)
    args = parser.parse_args()
    rows = [measure(path, args.seconds, args.streams, args.requests) for path in args.paths]
    for row in rows:
        print(row)
    print(records.write("load", {"seconds": args.seconds, "streams": args.streams, "rows": rows}))


if __name__ == "__main__":
    main()
