"""What /metrics tells Prometheus; names follow its conventions, values are those of one server process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server; each has a registry of its own, so that several fit into a process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("gptq_belle_requests", "Answers by how they ended", ["outcome"], registry=registry)
        self.prompt_tokens = Counter("gptq_belle_prompt_tokens", "Tokens of prompts read", registry=registry)
        self.tokens = Counter("gptq_belle_generated_tokens", "Tokens generated", registry=registry)
        self.waiting = Gauge("gptq_belle_queue_length", "Answers that wait for a slot", registry=registry)
        self.running = Gauge("gptq_belle_batch_size", "Answers that are being generated", registry=registry)
        self.cache = Gauge("gptq_belle_cache_used_ratio", "Positions of the key-value cache in use", registry=registry)
        self.speed = Gauge("gptq_belle_tokens_per_second", "Tokens a second over the last second of work",
                           registry=registry)
        self.first = Histogram("gptq_belle_time_to_first_token_seconds", "From the request to its first token",
                               buckets=SECONDS, registry=registry)
