"""What the server counts, in Prometheus's format. Each application has a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from .engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)  # bounds of histograms


class Metrics:
    def __init__(self, engine: Engine):
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)  # memory and processor time, on Linux
        labels = ("path", "status")
        self.requests = Counter("paligemma_requests", "Requests that have ended.", labels, registry=own)
        self.seconds = Histogram(
            "paligemma_request_seconds", "From the head of a request to the end of its response.", ("path",),
            buckets=SECONDS, registry=own,
        )  # fmt: skip
        self.first_token = Histogram(
            "paligemma_first_token_seconds",
            "From a request to its first token.",
            buckets=SECONDS,
            registry=own,
        )
        self.prompt_tokens = Counter(
            "paligemma_prompt_tokens", "Tokens of prompts and pictures.", registry=own
        )
        self.new_tokens = Counter("paligemma_new_tokens", "Tokens of answers.", registry=own)
        self.pictures = Counter("paligemma_pictures", "Pictures of answered prompts.", registry=own)
        self.open = Gauge("paligemma_requests_open", "Chat completions that have not ended.", registry=own)
        for name, about, value in (
            ("rows", "Rows that can share a decode step.", lambda: engine.slots),
            ("rows_running", "Rows that are decoded.", lambda: engine.running),
            ("rows_waiting", "Prompts that wait for a free row.", lambda: engine.waiting),
            ("engine_alive", "1 while the engine's thread runs.", lambda: int(engine.alive)),
        ):
            Gauge(f"paligemma_{name}", about, registry=own).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
