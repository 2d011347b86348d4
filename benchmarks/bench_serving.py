"""Tokens a second of a server with one stream and with several, taken in turns; time to first token beside them.

    gptq-belle quantize examples/belle_tiny/bloom build/bloom-4bit --preset fast --allow-short   # and llama
    python benchmarks/bench_serving.py build/bloom-4bit build/llama-4bit
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import records

PROMPT = "写一首关于春天的诗"


@contextmanager
def server(path: str, slots: int) -> Iterator[str]:
    """A server of a model on a free port; its address."""
    command = [sys.executable, "-m", "gptq_belle.cli", "serve", path, "--port", "0", "--device", "cpu", "--json",
               "--max-batch", str(slots)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        said = ""
        while not said.endswith("}\n"):
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server of {path} ended with {process.wait()}")
            said += line
        try:
            yield json.loads(said)["url"]
        finally:
            process.terminate()


async def stream(client: httpx.AsyncClient, tokens: int) -> tuple[int, float]:
    """(tokens, seconds to the first) of one answer."""
    fields = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens, "temperature": 0,
              "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    began, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=fields) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
            elif not first and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - began
    return count, first


async def together(url: str, streams: int, tokens: int) -> tuple[float, float]:
    """(tokens a second, median seconds to the first token) of so many streams that begin together."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        began = time.perf_counter()
        found = await asyncio.gather(*[stream(client, tokens) for _ in range(streams)])
        seconds = time.perf_counter() - began
    return sum(count for count, _ in found) / seconds, statistics.median(first for _, first in found)


def measure(path: str, streams: list[int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each number of streams; they take turns, medians are told."""
    seen: dict[int, list[tuple[float, float]]] = {count: [] for count in streams}
    with server(path, max(streams)) as url:
        for turn in range(rounds + 1):  # the first is a warm-up
            for count in streams:
                found = asyncio.run(together(url, count, tokens))
                if turn:
                    seen[count].append(found)
    medians = {count: [statistics.median(figures) for figures in zip(*found, strict=True)]
               for count, found in seen.items()}
    return [{"model": Path(path).name, "streams": count, "tokens_per_second": speed, "seconds_to_first_token": first,
             "against_first": speed / medians[streams[0]][0]} for count, (speed, first) in medians.items()]


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="model directories")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = [row for path in args.paths for row in measure(path, args.streams, args.tokens, args.rounds)]
    for row in rows:
        print(f"{row['model']:>12} {row['streams']:3} streams {row['tokens_per_second']:8.1f} tokens/s "
              f"({row['against_first']:.2f}), first token after {1000 * row['seconds_to_first_token']:.0f} ms")
    print(records.write("serving", {"tokens": args.tokens, "rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
