"""What is told of each request: metrics, a span with its times, a line of the lookup trace; and whether only its salt made it miss."""

from __future__ import annotations

import logging
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import xxhash

from lmc.cache.config import CacheConfig
from lmc.cache.directory import Counts, Miss, Ticket, Told
from lmc.cache.keys import ChunkKey, Namespace
from lmc.cache.observe.logs import Sparingly
from lmc.cache.observe.metrics import CacheMetrics
from lmc.cache.observe.record import TraceRecorder
from lmc.cache.plan import Report, request_name

logger = logging.getLogger(__name__)

DEVICE = "device"


class Known(Protocol):
    """What is asked of a directory: the engine's own, or what it last heard of a node's."""

    @property
    def counts(self) -> Counts: ...
    @property
    def num_open(self) -> int: ...
    @property
    def num_pins(self) -> int: ...
    @property
    def num_writing(self) -> dict[str, int]: ...
    def usage(self) -> dict[str, tuple[int, int]]: ...
    def room(self) -> dict[str, tuple[int, int]]: ...
    def known_remote(self) -> dict[str, int]: ...
    def idle(self, key: ChunkKey, now: float) -> float | None: ...


class Admitted(Protocol):
    """What is asked of a request; see Request."""

    @property
    def name(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def told(self) -> Told: ...
    @property
    def arrived(self) -> float: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def computed(self) -> int: ...
    @property
    def sources(self) -> dict[str, int]: ...
    @property
    def keys(self) -> Sequence[ChunkKey]: ...
    def miss(self) -> str | None: ...


class Accounting:
    """Receives the events. A chunk has num_parts parts of chunk_bytes, on as many ranks. Raises ConfigError when the trace cannot be
    written."""

    def __init__(
        self,
        config: CacheConfig,
        namespace: Namespace,
        directory: Known,
        chunk_bytes: int,
        num_parts: int,
        clock: Callable[[], float],
        shape: Mapping[str, object] | None = None,
    ) -> None:
        """shape: of a model with several KV groups, for the trace."""
        self._directory = directory
        self._chunk_tokens = namespace.chunk_tokens
        self._stored = 0  # chunks since the last report
        self.metrics = _open_metrics(directory)
        self.metrics.chunk_bytes.set(chunk_bytes)
        self.spans = Spans(clock)
        self._sparingly = Sparingly()
        self._recorder = None
        if config.record is not None:
            self._recorder = TraceRecorder(
                config.record,
                limit=config.record_limit,
                chunk_tokens=namespace.chunk_tokens,
                chunk_bytes=chunk_bytes * num_parts,
                namespace=namespace.label(),
                now=clock(),
                shape=shape,
            )

    def close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()

    def admitted(self, request: Admitted, answered: float | None, now: float) -> None:
        """The engine took a request in for the first time. answered: time of the answer to its first lookup."""
        metrics = self.metrics
        metrics.requests.inc()
        metrics.lookup_tokens.inc(request.num_tokens)
        metrics.device_tokens.inc(request.computed)
        metrics.wait_seconds.observe(max(0.0, now - request.arrived))
        for tier, tokens in request.sources.items():
            metrics.hit_tokens.labels(tier).inc(tokens)
        have = request.computed + sum(request.sources.values())
        why = request.miss()
        if why is not None:
            metrics.misses.labels(why).inc()
            metrics.miss_tokens.labels(why).inc(request.num_tokens - have)
        if why in (Miss.LOAD_DEADLINE, Miss.REMOTE_DEADLINE):
            metrics.waits.inc()
            text = f"{why}: request {request.name} waits no longer and computes {request.num_tokens - have} tokens"
            self._sparingly.warn(logger, why, text, request=request.name, cause=str(why))
        keys = request.keys
        if request.sources:
            idle = self._directory.idle(keys[have // self._chunk_tokens - 1], now)
            if idle is not None:
                metrics.reuse_age.observe(idle)
        hits = {DEVICE: request.computed, **request.sources}
        answered = now if answered is None else answered
        self.spans.add(Span(request.name, request.num_tokens, hits, why, request.arrived, answered, now))
        if self._recorder is not None:
            self._recorder.lookup(now, request.name, request.num_tokens, keys, request.tenant, hits, request.told)

    def answered(self, tier: str, seconds: float, failure: str) -> None:
        """A tier answered which chunks it holds, or failed with this cause."""
        self.metrics.ask_seconds.labels(tier).observe(seconds)
        if failure:
            self.metrics.ask_failures.labels(tier, failure).inc()

    def ended(self, ticket: Ticket, cause: str | None) -> None:
        """An operation ended on all ranks, with success or with this cause of failure."""
        metrics = self.metrics
        if cause is not None:
            metrics.failures.labels(ticket.kind).inc()
            metrics.failure_causes.labels(ticket.kind, ticket.tier, cause).inc()
        elif ticket.kind == "store":
            self._stored += 1
        elif ticket.kind == "write":
            metrics.written_chunks.labels(ticket.tier).inc()
        elif ticket.kind == "stage":
            metrics.staged_chunks.labels(ticket.tier).inc()

    def reported(self, report: Report) -> None:
        """The directory has processed a report."""
        if self._stored:  # together, because a counter takes longer than the directory
            self.metrics.stored_chunks.inc(self._stored)
            self.metrics.stored_tokens.inc(self._stored * self._chunk_tokens)
            self._stored = 0
        for transfer, num_bytes, seconds in report.transfers:
            self.metrics.transferred_bytes.labels(transfer).inc(num_bytes)
            self.metrics.transfer_seconds.labels(transfer).observe(seconds)
        for run in report.codecs:
            self.metrics.note_codec(run)
        self.spans.loaded({request_name(request): load for request, load in report.loads.items()})
        for (rank, tier, direction), reading in report.breakers.items():
            self.metrics.note_breaker(rank, tier, direction, reading)
        for rank, copying in report.copying.items():
            self.metrics.note_copying(rank, copying)
        self.metrics.settle(self._directory.counts)


def explained(request: Admitted) -> dict[str, object]:
    """Where a request's tokens came from, and why its hit ended where it did."""
    miss = request.miss()
    return {
        "prompt_tokens": request.num_tokens,
        "hit_tokens": {DEVICE: request.computed, **request.sources},
        "miss": str(miss) if miss is not None else None,
    }


def _open_metrics(directory: Known) -> CacheMetrics:
    bounded, others = list(directory.usage()), list(directory.known_remote())
    metrics = CacheMetrics(bounded, [name for name in others if name not in bounded])
    metrics.follow("pending", lambda: directory.num_open)
    metrics.follow("pins", lambda: directory.num_pins)
    metrics.follow_tiers("slots_used", lambda: {tier: used for tier, (used, _) in directory.usage().items()}, bounded)
    metrics.follow_tiers("slots", lambda: {tier: fit for tier, (_, fit) in directory.usage().items()}, bounded)
    metrics.follow_tiers(
        "tier_bytes", lambda: {tier: used for tier, (used, _) in directory.room().items()}, bounded[1:]
    )
    metrics.follow_tiers(
        "tier_capacity_bytes", lambda: {tier: most for tier, (_, most) in directory.room().items()}, bounded[1:]
    )
    metrics.follow_tiers("known_chunks", directory.known_remote, others)
    metrics.follow_tiers("write_queue", lambda: directory.num_writing, metrics.below)
    return metrics


_REMEMBERED = 8_192
_MANY = b""  # first chunks that came under several roots


class Salts:
    """First chunks by hash. The hashes are compared only inside this process, and decide only a label of the metrics."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._roots: OrderedDict[int, bytes] = OrderedDict()  # first chunk's tokens -> the root it came under

    def seen_elsewhere(self, tokens: Sequence[int], root: bytes) -> bool:
        """Whether the first chunk of tokens was seen under another root than this one. Then it is remembered under this one."""
        first = xxhash.xxh3_64_intdigest(array("I", tokens[: self._chunk_tokens]))
        known = self._roots.get(first)
        elsewhere = known is not None and known != root
        self._roots[first] = _MANY if elsewhere else root
        self._roots.move_to_end(first)
        if len(self._roots) > _REMEMBERED:
            self._roots.popitem(last=False)
        return elsewhere


KEEP = 8192


class Span(NamedTuple):
    """Times are seconds on the engine's clock. Loads are sums over batches; over ranks, bytes are added and the longest time counts."""

    request: str
    tokens: int  # of the prompt
    hit_tokens: dict[str, int]  # by tier; "device" is the engine's own prefix cache
    miss: str | None  # why the hit ended before the prompt's last chunk
    asked_s: float  # the first lookup
    answered_s: float  # its answer: remote tiers were asked, and lower tiers read into host memory
    admitted_s: float  # the engine took the request in; only then it is loaded
    load_bytes: int = 0
    load_seconds: float = 0.0


class Spans:
    """The newest `keep` requests that were admitted."""

    def __init__(self, clock: Callable[[], float], keep: int = KEEP) -> None:
        self._clock = clock
        self._keep = keep
        self._spans: dict[str, Span] = {}  # by request, oldest first
        self._lock = threading.Lock()

    def add(self, span: Span) -> None:
        with self._lock:
            self._spans.pop(span.request, None)
            self._spans[span.request] = span
            if len(self._spans) > self._keep:
                del self._spans[next(iter(self._spans))]

    def loaded(self, loads: Mapping[str, tuple[int, float]]) -> None:
        """Add loaded bytes and seconds, by request. Requests that are no longer kept are ignored."""
        with self._lock:
            for request, (num_bytes, seconds) in loads.items():
                if (span := self._spans.get(request)) is not None:
                    self._spans[request] = span._replace(
                        load_bytes=span.load_bytes + num_bytes, load_seconds=span.load_seconds + seconds
                    )

    def read(self, newest: int = KEEP) -> dict[str, object]:
        """The newest spans, from old to new, and the present time of the clock."""
        with self._lock:  # held for no longer than a copy of references: the scheduler's thread waits for it
            spans = list(self._spans.values())
        return {"now_s": self._clock(), "requests": [span._asdict() for span in spans[max(0, len(spans) - newest) :]]}
