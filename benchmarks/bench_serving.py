"""Measure tokens/s and time to first token of a server with one stream and with several, in turns.

With --masks, none, one and all of the streams follow a JSON schema.

    gptq-belle quantize examples/belle_tiny/bloom build/bloom-4bit --preset fast --allow-short   # and llama
    python benchmarks/bench_serving.py build/bloom-4bit build/llama-4bit
    python benchmarks/bench_serving.py examples/belle_tiny/bloom examples/belle_tiny/llama --streams 8 --masks
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
from urllib.parse import urlsplit

import records

PROMPT = "写一首关于春天的诗"
SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}  # longer than every answer here
Case = tuple[int, int]  # numbers of streams, and of those that follow SCHEMA


@contextmanager
def server(path: str | Path, slots: int, device: str = "cpu") -> Iterator[str]:
    """Start a server on a free port and yield its address."""
    command = [sys.executable, "-m", "gptq_belle.cli", "serve", str(path), "--port", "0", "--device", device,
               "--json", "--max-batch", str(slots)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        output = ""
        while not output.endswith("}\n"):
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server of {path} exited with code {process.wait()}")
            output += line
        try:
            yield json.loads(output)["url"]
        finally:
            process.terminate()


async def stream(url: str, tokens: int, is_masked: bool = False) -> tuple[int, float]:
    """Request one answer; return its tokens and the seconds to the first one.

    The client shares the cores with the server, so it does only what every client must: read and parse each event.
    A chunk ends with an event, so the lines of the chunked encoding precede an event and are skipped.
    """
    place = urlsplit(url)
    body = json.dumps({"messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens, "temperature": 0,
                       "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
                       "guided_json": SCHEMA if is_masked else None}).encode()
    began, first, count = time.perf_counter(), 0.0, 0
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
                 f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    if b" 200 " not in (head := await reader.readuntil(b"\r\n\r\n")):
        raise SystemExit(head.decode())
    while not (text := (await reader.readuntil(b"\n\n")).partition(b"data: ")[2]).startswith(b"[DONE]"):
        event = json.loads(text)
        if event.get("usage"):
            count = event["usage"]["completion_tokens"]
        elif not first and event["choices"][0]["delta"].get("content"):
            first = time.perf_counter() - began
    writer.close()
    return count, first


async def together(url: str, case: Case, tokens: int) -> tuple[float, float]:
    """Run several streams at once; return tokens per second and the median seconds to the first token."""
    began = time.perf_counter()
    found = await asyncio.gather(*[stream(url, tokens, number < case[1]) for number in range(case[0])])
    seconds = time.perf_counter() - began
    return sum(count for count, _ in found) / seconds, statistics.median(first for _, first in found)


def measure(path: str, cases: list[Case], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row of medians per case, measured in turns."""
    seen: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    with server(path, max(streams for streams, _ in cases)) as url:
        for turn in range(rounds + 1):  # the first is a warm-up
            for case in cases:
                found = asyncio.run(together(url, case, tokens))
                if turn:
                    seen[case].append(found)
    medians = {case: [statistics.median(figures) for figures in zip(*found, strict=True)]
               for case, found in seen.items()}
    return [{"model": Path(path).name, "streams": streams, "masked": masked, "tokens_per_second": speed,
             "seconds_to_first_token": first, "against_first": speed / medians[cases[0]][0]}
            for (streams, masked), (speed, first) in medians.items()]


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="model directories")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="tokens per answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--masks", action="store_true", help="compare streams with and without a JSON schema")
    args = parser.parse_args()
    cases = [(count, masked) for count in args.streams for masked in ([0, 1, count] if args.masks else [0])]
    rows = [row for path in args.paths for row in measure(path, cases, args.tokens, args.rounds)]
    for row in rows:
        print(f"{row['model']:>12} {row['streams']:3} streams, {row['masked']} masked, "
              f"{row['tokens_per_second']:8.1f} tokens/s ({row['against_first']:.2f}), "
              f"first token after {1000 * row['seconds_to_first_token']:.0f} ms")
    name = "serving_masks" if args.masks else "serving"
    print(records.write(name, {"tokens": args.tokens, "rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
