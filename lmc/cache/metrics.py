"""Prometheus metrics of one cache: what they are called, what they count, and the endpoint that serves them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from lmc.cache.config import MetricsConfig

logger = logging.getLogger(__name__)

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class CacheMetrics:
    """All counters start at 0 for every tier, so that a rate over a restart is right."""

    def __init__(self, tiers: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        names = list(tiers)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lmc_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"lmc_{name}", text, labels, registry=self.registry)

        self.requests = counter("requests", "Requests looked up")
        self.lookup_tokens = counter("lookup_tokens", "Prompt tokens looked up")
        self.hit_tokens = counter(
            "hit_tokens", "Prompt tokens loaded from the cache, by the tier that held them", "tier"
        )
        self.device_tokens = counter("device_tokens", "Prompt tokens that the engine's own prefix cache held")
        self.misses = counter("misses", "Lookups that ended before the prompt's last chunk, by reason", "reason")
        self.waits = counter("deadline_exceeded", "Lookups that did not wait for a tier any longer")
        self.stored_chunks = counter("stored_chunks", "Chunks stored in host memory")
        self.stored_tokens = counter("stored_tokens", "Tokens of these chunks")
        self.written_chunks = counter("written_chunks", "Chunks written to a tier below the host", "tier")
        self.staged_chunks = counter("staged_chunks", "Chunks read from a tier below the host", "tier")
        self.dropped_chunks = counter(
            "dropped_chunks", "Chunks not stored (no slot free) or not written (queue full)", "what"
        )
        self.evicted_chunks = counter("evicted_chunks", "Chunks evicted to make room", "tier")
        self.failures = counter("failures", "Operations that failed; each became a miss", "operation")
        self.errors = counter("errors", "Faults inside lmc; the engine went on without the cache for that step")
        self.transferred_bytes = counter("transferred_bytes", "Bytes copied", "transfer")
        self.transfer_seconds = Histogram(
            "lmc_transfer_seconds",
            "Time of one batch of copies",
            ("transfer",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.pending = gauge("pending_operations", "Copies handed out and not reported back")
        self.pins = gauge("pins", "Requests that keep chunks from eviction")
        self.slots = gauge("slots", "Chunks that fit", "tier")
        self.slots_used = gauge("slots_used", "Chunks held", "tier")
        self.chunk_bytes = gauge("chunk_bytes", "Bytes of one chunk on one rank")
        for name in names:
            self.hit_tokens.labels(name)
            self.evicted_chunks.labels(name)

    def follow(self, name: str, read: Callable[[], float]) -> None:
        """Read a gauge when it is scraped."""
        gauge: Gauge = getattr(self, name)
        gauge.set_function(read)

    def follow_usage(self, usage: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        """Tier to (chunks held, chunks that fit), read when it is scraped."""
        for tier in usage():
            for which, gauge in enumerate((self.slots_used, self.slots)):
                gauge.labels(tier).set_function(partial(_read_usage, usage, tier, which))


def _read_usage(usage: Callable[[], Mapping[str, tuple[int, int]]], tier: str, which: int) -> float:
    return usage()[tier][which]


class MetricsServer:
    """Serves a registry over HTTP until close()."""

    def __init__(self, config: MetricsConfig, registry: CollectorRegistry) -> None:
        """Raises OSError when the port is in use."""
        self._server: WSGIServer
        self._thread: Thread
        self._server, self._thread = start_http_server(config.port, addr=config.host, registry=registry)
        self.url = f"http://{config.host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
