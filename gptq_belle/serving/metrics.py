"""Prometheus metrics of one server process, served at /metrics. Names of times are vLLM's after the prefix."""

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from gptq_belle.serving.queued_request import QueuedRequest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SPEED_WINDOW = 1.0  # seconds over which tokens are counted for their speed


class Metrics:
    """Metrics of one server, in a separate registry so that a process can have several servers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("gptq_belle_requests", "Requests by outcome", ["outcome"], registry=registry)
        self.failures = Counter("gptq_belle_engine_failures", "Failures of the engine, of one request or of more",
                                registry=registry)
        self.prompt_tokens = Counter("gptq_belle_prompt_tokens", "Prompt tokens", registry=registry)
        self.tokens = Counter("gptq_belle_generated_tokens", "Generated tokens", registry=registry)
        self.waiting = Gauge("gptq_belle_queue_length", "Requests waiting for a slot", registry=registry)
        self.running = Gauge("gptq_belle_batch_size", "Running requests", registry=registry)
        self.cache = Gauge("gptq_belle_cache_used_ratio", "Share of the KV cache in use", registry=registry)
        self.speed = Gauge("gptq_belle_tokens_per_second", "Generated tokens per second",
                           registry=registry)
        self.first = Histogram("gptq_belle_time_to_first_token_seconds", "Time from the request to its first token",
                               buckets=SECONDS, registry=registry)
        self.between = Histogram("gptq_belle_inter_token_latency_seconds", "Time between two tokens of an answer",
                                 buckets=SECONDS, registry=registry)
        self.queue = Histogram("gptq_belle_request_queue_time_seconds", "Time from the request to its slot",
                               buckets=SECONDS, registry=registry)
        self.latency = Histogram("gptq_belle_e2e_request_latency_seconds", "Time from the request to its end",
                                 buckets=SECONDS, registry=registry)
        self.cache_queries = Counter("gptq_belle_prefix_cache_queries", "Prompt tokens looked up in slots and in the "
                                     "prefix cache", registry=registry)
        self.cache_hits = Counter("gptq_belle_prefix_cache_hits", "Prompt tokens found there", registry=registry)
        self.prefix_cache = Gauge("gptq_belle_prefix_cache_bytes", "Memory of the blocks in the prefix cache",
                                  registry=registry)
        self._window = time.perf_counter(), 0  # start, and tokens since then

    def set_gauges(self, *, waiting: int, running: int, cache: float) -> None:
        """Set the queue length, the batch size, and the share of the KV cache in use."""
        self.waiting.set(waiting)
        self.running.set(running)
        self.cache.set(cache)

    def count_token(self, answer: "QueuedRequest", now: float) -> None:
        """Measure the time of a new token of an answer at `now` (`time.perf_counter`)."""
        age = now - answer.start
        if answer.first is None:
            answer.first = age
            self.first.observe(age)
            self.cache_queries.inc(len(answer.ids))
            self.cache_hits.inc(answer.reused)
        else:
            self.between.observe(age - answer.last)
        answer.last = age

    def count_tokens(self, tokens: int) -> None:
        """Count the tokens of one step, and update their speed after each window."""
        self.tokens.inc(tokens)
        since, before = self._window
        seconds = time.perf_counter() - since
        if seconds >= SPEED_WINDOW:
            self.speed.set((before + tokens) / seconds if seconds < 2 * SPEED_WINDOW else 0)
            self._window = time.perf_counter(), 0
        else:
            self._window = since, before + tokens

    def stop(self, lost: int) -> None:
        """Count the end of the engine, with `lost` unfinished requests; nothing is running or waiting after it."""
        self.failures.inc()
        self.requests.labels("failed").inc(lost)
        self.set_gauges(waiting=0, running=0, cache=0)
        self.speed.set(0)
