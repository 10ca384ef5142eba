"""Prometheus metrics of one cache: their names and what they count. docs/operations.md explains how to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lmc.cache.directory import Counts
from lmc.cache.plan import BreakerReading, CodecRun, CopyReading

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_AGES = (1.0, 10.0, 60.0, 300.0, 1800.0, 3600.0, 4 * 3600.0, 24 * 3600.0, 7 * 24 * 3600.0)


class CacheMetrics:
    """All counters start at 0 for every tier, so that a rate over a restart is right. `remote` tiers have no capacity."""

    def __init__(self, bounded: Sequence[str], remote: Sequence[str] = ()) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lmc_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"lmc_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"lmc_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Requests looked up")
        self.lookup_tokens = counter("lookup_tokens", "Prompt tokens looked up")
        self.hit_tokens = counter(
            "hit_tokens", "Prompt tokens loaded from the cache, by the tier that held them", "tier"
        )
        self.device_tokens = counter("device_tokens", "Prompt tokens that the engine's own prefix cache held")
        self.misses = counter("misses", "Lookups that ended before the prompt's last chunk, by reason", "reason")
        self.miss_tokens = counter("miss_tokens", "Prompt tokens that these lookups left to compute", "reason")
        self.lookup_seconds = histogram("lookup_seconds", "Time of one lookup on the scheduler's thread", _SECONDS)
        self.wait_seconds = histogram("wait_seconds", "Time from a request's first lookup to its answer", _SECONDS)
        self.waits = counter("deadline_exceeded", "Lookups that did not wait for a tier any longer")
        self.ask_seconds = histogram("ask_seconds", "Time a tier took to say what it holds", _SECONDS, "tier")
        self.ask_failures = counter("ask_failures", "Times that a tier could not say what it holds", "tier", "cause")
        self.reuse_age = histogram("reuse_age_seconds", "Time since the last touch of a hit's last chunk", _AGES)

        self.stored_chunks = counter("stored_chunks", "Chunks stored in host memory")
        self.stored_tokens = counter("stored_tokens", "Tokens of these chunks")
        self.written_chunks = counter("written_chunks", "Chunks written to a tier below the host", "tier")
        self.staged_chunks = counter("staged_chunks", "Chunks read from a tier below the host", "tier")
        self.dropped_chunks = counter(
            "dropped_chunks", "Chunks not stored (no slot free) or not written (queue full)", "what"
        )
        self.evicted_chunks = counter("evicted_chunks", "Chunks evicted to make room", "tier")
        self.removed_chunks = counter("removed_chunks", "Chunks gone from a tier, for whatever cause", "tier", "cause")

        self.failures = counter("failures", "Operations that failed; each became a miss", "operation")
        self.failure_causes = counter(
            "failure_causes", "The same operations by tier and cause", "operation", "tier", "cause"
        )
        self.breaker_open = gauge(
            "breaker_open", "1 while one direction of a tier is left alone after failures", "tier", "direction"
        )
        self.breaker_events = counter(
            "breaker_events", "Failed calls, calls not made, and openings", "tier", "direction", "event"
        )

        self.transferred_bytes = counter("transferred_bytes", "Bytes copied", "transfer")
        self.transfer_seconds = histogram("transfer_seconds", "Time of one batch of copies", _SECONDS, "transfer")
        self.transfer_batches = counter(
            "transfer_batches", "Batches of copies, by the backend that was chosen for them", "backend", "direction"
        )
        self.transfer_refusals = counter(
            "transfer_refusals", "Batches that a backend could not copy and another one did, with the reason", "reason"
        )
        self.copy_threads = gauge("copy_threads", "CPU threads that share a large batch of copies out", "rank")
        self.pinned_slots = gauge("pinned_slots", "Host slots that are registered with the device's driver", "rank")
        self.host_problem = gauge("host_problem", "1 while host memory is slower than it should be", "rank", "problem")
        self.codec_raw_bytes = counter("codec_raw_bytes", "Bytes of the chunks that a codec saw", "tier", "transfer")
        self.codec_stored_bytes = counter("codec_stored_bytes", "Bytes that these take in the tier", "tier", "transfer")
        self.codec_seconds = counter("codec_seconds", "Time that the codec took, over all threads", "tier", "transfer")
        self.codec_ratio = gauge("codec_ratio", "Stored bytes / raw bytes of what was written since the start", "tier")
        self.tier_bytes = gauge("tier_bytes", "Bytes that a tier's chunks take, as they are stored", "tier")
        self.tier_capacity_bytes = gauge("tier_capacity_bytes", "Bytes that they may take", "tier")
        self.pending = gauge("pending_operations", "Copies handed out and not reported back")
        self.write_queue = gauge("write_queue", "Writes to a tier below the host that are under way", "tier")
        self.pins = gauge("pins", "Owners of pins, which keep chunks from eviction: requests and administrators")
        self.pins_cut = counter("pins_cut", "Pins of requests that a setting made smaller than asked for", "limit")
        self.slots = gauge("slots", "Chunks that fit", "tier")
        self.slots_used = gauge("slots_used", "Chunks held", "tier")
        self.known_chunks = gauge("known_chunks", "Chunks of others that are known to be in a tier", "tier")
        self.chunk_bytes = gauge("chunk_bytes", "Bytes of one chunk on one rank")

        self.below = [*bounded[1:], *remote]
        for name in (*bounded, *remote):
            self.hit_tokens.labels(name)
        for name in bounded:
            self.evicted_chunks.labels(name)
        for name in self.below:
            self.written_chunks.labels(name)
            self.staged_chunks.labels(name)
        for operation in ("store", "load", "stage", "write", "delete"):
            self.failures.labels(operation)
        for what in ("store", "write"):
            self.dropped_chunks.labels(what)
        self._written: dict[str, tuple[int, int]] = {}  # tier -> (raw bytes, stored bytes) of what its codec wrote
        self._counts = Counts()  # as of the last settle()
        self._breakers: dict[tuple[int, str, str], BreakerReading] = {}
        self._copying: dict[int, CopyReading] = {}

    def follow(self, name: str, read: Callable[[], float]) -> None:
        """Set a gauge's value by calling a function when it is scraped."""
        gauge: Gauge = getattr(self, name)
        gauge.set_function(read)

    def follow_tiers(self, name: str, read: Callable[[], Mapping[str, float]], tiers: Iterable[str]) -> None:
        """Do the same for a gauge with a label for the tier."""
        gauge: Gauge = getattr(self, name)
        for tier in tiers:
            gauge.labels(tier).set_function(partial(_read_tier, read, tier))

    def settle(self, counts: Counts) -> None:
        """Add the directory's counts since the last call."""
        before = self._counts
        for what, now, then in (
            ("store", counts.stores_dropped, before.stores_dropped),
            ("write", counts.writes_dropped, before.writes_dropped),
        ):
            if now > then:
                self.dropped_chunks.labels(what).inc(now - then)
        for tier, total in counts.evicted.items():
            self.evicted_chunks.labels(tier).inc(total - before.evicted.get(tier, 0))
        for (tier, cause), total in counts.removed.items():
            self.removed_chunks.labels(tier, cause).inc(total - before.removed.get((tier, cause), 0))
        self._counts = Counts(counts.stores_dropped, counts.writes_dropped, dict(counts.evicted), dict(counts.removed))

    def note_breaker(self, rank: int, tier: str, direction: str, reading: BreakerReading) -> None:
        before = self._breakers.get((rank, tier, direction), BreakerReading(False, 0, 0, 0))
        if reading == before and (rank, tier, direction) in self._breakers:
            return
        self._breakers[rank, tier, direction] = reading
        for event in ("failures", "refusals", "openings"):
            growth = getattr(reading, event) - getattr(before, event)
            self.breaker_events.labels(tier, direction, event).inc(growth)
        is_open = any(known.is_open for (_, *way), known in self._breakers.items() if way == [tier, direction])
        self.breaker_open.labels(tier, direction).set(is_open)

    def note_codec(self, run: CodecRun) -> None:
        self.codec_raw_bytes.labels(run.tier, run.kind).inc(run.raw_bytes)
        self.codec_stored_bytes.labels(run.tier, run.kind).inc(run.stored_bytes)
        self.codec_seconds.labels(run.tier, run.kind).inc(run.seconds)
        if run.kind == "write":
            raw, stored = self._written.get(run.tier, (0, 0))
            self._written[run.tier] = raw + run.raw_bytes, stored + run.stored_bytes
            self.codec_ratio.labels(run.tier).set((stored + run.stored_bytes) / (raw + run.raw_bytes))

    def note_copying(self, rank: int, reading: CopyReading) -> None:
        before = self._copying.get(rank, CopyReading({}, {}, 0, 0, ""))
        self._copying[rank] = reading
        for (backend, direction), batches in reading.batches.items():
            growth = batches - before.batches.get((backend, direction), 0)
            self.transfer_batches.labels(backend, direction).inc(growth)
        for reason, batches in reading.refusals.items():
            self.transfer_refusals.labels(reason).inc(batches - before.refusals.get(reason, 0))
        self.copy_threads.labels(str(rank)).set(reading.threads)
        self.pinned_slots.labels(str(rank)).set(reading.pinned_slots)
        if before.problem and before.problem != reading.problem:
            self.host_problem.remove(str(rank), before.problem)
        if reading.problem:
            self.host_problem.labels(str(rank), reading.problem).set(1)

    @property
    def copying(self) -> Mapping[int, CopyReading]:
        """Record the newest copy statistics of a rank."""
        return self._copying


def _read_tier(read: Callable[[], Mapping[str, float]], tier: str) -> float:
    return read().get(tier, 0.0)
