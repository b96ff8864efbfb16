"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo.engine.async_engine import AsyncEngine
from octavo.engine.async_request import AsyncRequest

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600,
)  # fmt: skip
# Metric, field of EngineStats, help.
_GAUGES = (
    ("octavo_answers_running", "running", "Answers in the making."),
    ("octavo_requests_waiting", "waiting", "Requests that have not begun, or were preempted."),
    ("octavo_pages_used", "pages_used", "KV cache pages that running answers hold."),
    ("octavo_pages", "pages_total", "KV cache pages there are."),
)
_COUNTERS = (
    ("octavo_prompt_tokens", "prompt_tokens_total", "Prompt tokens of requests that began."),
    ("octavo_cached_tokens", "cached_tokens_total", "Of these, found in the prefix cache."),
    ("octavo_generated_tokens", "generated_tokens_total", "Tokens of all answers."),
    ("octavo_preemptions", "preemptions_total", "Answers that gave their pages up for others."),
    ("octavo_draft_tokens", "draft_tokens_total", "Tokens guessed by prompt lookup."),
    ("octavo_accepted_tokens", "accepted_tokens_total", "Of these, the model's own choice."),
)


class Metrics:
    """Counters, histograms and the engine's own figures, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "octavo_http_responses", "HTTP responses begun.", ["path", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._first_token = self._histogram(
            "octavo_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._per_token = self._histogram(
            "octavo_time_per_output_token_seconds", "Between tokens after the first, a request."
        )
        self._latency = self._histogram(
            "octavo_request_latency_seconds", "From a request's arrival to its last token."
        )

    def watch(self, engine: AsyncEngine) -> None:
        """Report an engine's figures from now on."""
        self._registry.register(_EngineCollector(engine))

    def count_response(self, path: str, status: int) -> None:
        """Count an HTTP response."""
        self._responses.labels(path, str(status)).inc()

    def observe(self, request: AsyncRequest) -> None:
        """Take the times of a request that has ended; one that was cut off has some of them."""
        if request.first_token is None or request.finished is None:
            return
        self._first_token.observe(request.first_token - request.arrived)
        if request.n_tokens is None:
            return
        self._latency.observe(request.finished - request.arrived)
        if request.n_tokens > 1:
            seconds = request.finished - request.first_token
            self._per_token.observe(seconds / (request.n_tokens - 1))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(name, help, buckets=_SECONDS, registry=self._registry)


class _EngineCollector(Collector):
    """The engine's figures at the moment of asking."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for name, field, help in _GAUGES:
            yield GaugeMetricFamily(name, help, getattr(stats, field))
        for name, field, help in _COUNTERS:
            yield CounterMetricFamily(name, help, getattr(stats, field))
