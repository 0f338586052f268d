"""What Prometheus reads of a server: its requests, their tokens and times, and how its engine does."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from andromeda.inference.engine.request import Stats
from andromeda.serving.pieces import Count, Piece

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
GAUGES = {
    "running": "Texts that are being written.",
    "waiting": "Texts that wait for room in the engine.",
    "used_pages": "Pages of the cache that texts hold.",
    "cached_pages": "Pages of the cache that are kept for prompts to come, and free to take.",
    "num_pages": "Pages of the cache.",
}
COUNTERS = {
    "total_prompt_tokens": "Tokens of prompts that the engine took, those read from the prefix cache among them.",
    "total_cached_tokens": "Tokens of prompts that were read from the prefix cache.",
    "total_new_tokens": "Tokens that were drawn.",
    "total_drafted_tokens": "Tokens that were guessed ahead.",
    "total_accepted_tokens": "Guesses that were right.",
    "total_preemptions": "Texts that gave way to others for lack of pages.",
    "total_steps": "Steps of the engine.",
}


class Metrics:
    """One server's own registry.

    Attributes:
        texts: that are written or wait to be.
        requests: by route and status.
        errors: requests that failed, by OpenAI's kind of error.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, about: str) -> Histogram:
            return Histogram(f"andromeda_{name}", about, buckets=SECONDS, registry=self.registry)

        self.texts = Gauge("andromeda_texts", "Texts that are written or wait to be.", registry=self.registry)
        self.requests = Counter(
            "andromeda_requests", "Requests that were answered.", ["route", "status"], registry=self.registry
        )
        self.errors = Counter("andromeda_errors", "Requests that failed.", ["type"], registry=self.registry)
        self.finished = Counter(
            "andromeda_finished_texts", "Texts that ended, by why.", ["reason"], registry=self.registry
        )
        self.disconnects = Counter(
            "andromeda_disconnects", "Requests whose client went away before the end.", registry=self.registry
        )
        self.first_token = histogram("time_to_first_token_seconds", "From a request to the first token of its answer.")
        self.between_tokens = histogram("time_between_tokens_seconds", "From one token of a text to its next.")
        self.seconds = histogram("request_seconds", "From a request to the end of its answer.")

    def watch_engine(self, stats: Callable[[], Stats]) -> None:
        """Adds what an engine says of itself, asked anew at each reading."""
        self.registry.register(_Engine(stats))

    def text(self) -> bytes:
        """All of it in Prometheus's text form."""
        return generate_latest(self.registry)

    async def watched(self, pieces: AsyncGenerator[Piece | Count, None]) -> AsyncGenerator[Piece | Count, None]:
        """The same pieces, timed and counted."""
        started = perf_counter()
        latest: dict[int, float] = {}
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Piece):
                    self._observe(piece, started, latest)
                else:
                    self.seconds.observe(perf_counter() - started)
                yield piece

    def _observe(self, piece: Piece, started: float, latest: dict[int, float]) -> None:
        now = perf_counter()
        if piece.tokens:
            if not latest:
                self.first_token.observe(now - started)
            if piece.index in latest:
                for _ in range(piece.tokens):  # several came at once where drafts were right
                    self.between_tokens.observe((now - latest[piece.index]) / piece.tokens)
            latest[piece.index] = now
        if piece.finish_reason is not None:
            self.finished.labels(piece.finish_reason).inc()


class _Engine(Collector):
    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, about in GAUGES.items():
            yield GaugeMetricFamily(f"andromeda_engine_{name}", about, value=getattr(stats, name))
        for name, about in COUNTERS.items():
            short = name.removeprefix("total_")
            yield CounterMetricFamily(f"andromeda_engine_{short}", about, value=getattr(stats, name))
