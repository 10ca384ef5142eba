"""The cache of one engine instance, as its scheduler sees it: what can be loaded, what shall be stored, what became of it.

Puts the directory to work for requests. Runs on the scheduler's thread, never waits and never copies: plans go to the workers, reports come
back. Any step may be late or fail; the answer to that is a shorter hit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lmc.cache.config import CacheConfig
from lmc.cache.directory import HOST, Directory, Found, Ticket
from lmc.cache.keys import ChunkKey, KeyChain, root
from lmc.cache.metrics import CacheMetrics, MetricsServer
from lmc.cache.plan import SKIP, BlockCopy, Plan, Report, RequestCopies, TierCopy, WorkerReady
from lmc.cache.policy.registry import get_policy
from lmc.cache.record import TraceRecorder
from lmc.errors import ConfigError

logger = logging.getLogger(__name__)

DEVICE = "device"
_PIN_GRACE_SECONDS = 60.0  # a staged request may wait so long for a place in the batch
_NO_OPERATION = 0  # of deletions that nobody waits for


@dataclass(frozen=True)
class Identity:
    """What a request's chunks depend on beside its tokens."""

    lora: str = ""
    tenant: str = ""
    extra: Callable[[int, int], bytes] | None = None  # see KeyChain


@dataclass(slots=True)
class _Request:
    chain: KeyChain
    tenant: str
    found: Found | None = None  # at the first lookup: where the hit came from
    num_tokens: int = 0  # at the last lookup
    computed: int = 0  # tokens the engine holds itself, at the last lookup
    deadline: float | None = None  # for staging; set when it starts
    usable: int = 1 << 60  # chunks that may be offered; lowered when a load failed
    stored: int = 0  # chunks that need no store any more
    touched: bool = False
    admitted: bool = False
    sources: dict[str, int] = field(default_factory=dict)  # tokens that admit() promised, by tier
    loading: dict[int, int] = field(default_factory=dict)  # operation -> chunk index


class CacheEngine:
    """Raises ConfigError when the workers don't fit together."""

    def __init__(
        self,
        config: CacheConfig,
        ready: Sequence[WorkerReady],
        block_tokens: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        first = ready[0]
        if any(worker.namespace != first.namespace for worker in ready):
            raise ConfigError("the ranks disagree on the namespace; start them with the same model and settings")
        self.config = config
        self.namespace = first.namespace
        self.chunk_tokens = first.namespace.chunk_tokens
        self.chunk_bytes = first.chunk_bytes
        self._block_tokens = block_tokens
        self._blocks_per_chunk = self.chunk_tokens // block_tokens
        self._world = len(ready)
        self._clock = clock
        self._requests: dict[str, _Request] = {}
        self._loading: dict[int, str] = {}  # operation -> request
        self._ended: dict[int, int] = {}  # operation -> ranks that reported it
        self._causes: dict[int, str] = {}
        self._plan = Plan()
        self.directory = self._open_directory(ready)
        self.metrics = CacheMetrics([HOST, *first.stored])
        self.metrics.follow("pending", lambda: self.directory.num_open)
        self.metrics.follow("pins", lambda: self.directory.num_pins)
        self.metrics.follow_usage(self.directory.usage)
        self.metrics.chunk_bytes.set(self.chunk_bytes)
        self._counted_drops = {"store": 0, "write": 0}
        self._counted_evictions: dict[str, int] = {}
        self._server = self._open_server()
        self._recorder = self._open_recorder()

    @property
    def metrics_url(self) -> str | None:
        return self._server.url if self._server else None

    @property
    def busy(self) -> bool:
        """True while copies are under way, so that somebody must fetch reports."""
        return self.directory.num_open > 0 or bool(self._plan)

    # A request's life

    def lookup(self, request_id: str, tokens: Sequence[int], computed: int, identity: Identity) -> int | None:
        """How many tokens beyond `computed` can be loaded now, or None: ask again. Promises nothing; may be asked any number of times.

        The last token is never offered: the engine must compute it.
        """
        now = self._clock()
        request = self._requests.get(request_id)
        if request is None:
            start = root(self.namespace, lora=identity.lora, tenant=identity.tenant)
            request = _Request(KeyChain(start, self.chunk_tokens, identity.extra), identity.tenant)
            self._requests[request_id] = request
        request.num_tokens = len(tokens)
        request.computed = computed
        keys = request.chain.extend(tokens)
        limit = min((len(tokens) - 1) // self.chunk_tokens, request.usable)
        found = self.directory.lookup(keys[:limit], now)
        if request.found is None:
            request.found = found
        first = computed // self.chunk_tokens
        in_host = self._leading_in_host(found, first)
        if in_host < found.num_chunks and self._wait_for_staging(request_id, request, keys, first, found, now):
            return None
        gain = in_host * self.chunk_tokens - computed
        return gain if gain >= self.config.min_load_tokens else 0

    def admit(self, request_id: str, num_load: int, blocks: Sequence[int]) -> None:
        """The engine took the request in and will read num_load tokens beyond `computed` from the cache, into its blocks."""
        request = self._requests[request_id]
        first = request.computed // self.chunk_tokens
        last = (request.computed + num_load) // self.chunk_tokens
        if num_load:
            keys = request.chain.keys[first:last]
            tickets = self.directory.load(keys)
            held = request.computed // self._block_tokens  # blocks that the engine has, which others may be reading
            copies = []
            for index, ticket in enumerate(tickets, start=first):
                copies.append(self._block_copy(ticket, index, blocks, held))
                request.loading[ticket.operation] = index
                self._loading[ticket.operation] = request_id
            self._plan.loads.append(RequestCopies(request_id, tuple(copies)))
        self.directory.unpin(request_id)
        request.sources = self._sources(request, first, last)
        if not request.admitted:
            request.admitted = True
            self._count_lookup(request_id, request)

    def loaded_from(self, request_id: str) -> Mapping[str, int]:
        """Tokens by tier of what the last admit() promised."""
        return self._requests[request_id].sources

    def wants_store(self, request_id: str, num_valid: int, num_prompt: int) -> bool:
        """Whether store() would have something to do; cheap enough to ask in every step."""
        request = self._requests.get(request_id)
        return request is not None and self._storable(num_valid, num_prompt) > request.stored

    def store(
        self, request_id: str, tokens: Sequence[int], num_valid: int, num_prompt: int, blocks: Sequence[int]
    ) -> None:
        """After this step the first num_valid tokens of the request will have valid KV in its blocks: store the full chunks among them."""
        request = self._requests.get(request_id)
        if request is None:
            return
        full = self._storable(num_valid, num_prompt)
        if full <= request.stored:
            return
        keys = request.chain.extend(tokens)[:full]
        tickets = self.directory.store(keys, self._clock(), touch=not request.touched)
        request.touched = True
        request.stored = self.directory.num_settled(keys)
        if tickets:
            position = {key: index for index, key in enumerate(keys)}
            copies = tuple(self._block_copy(ticket, position[ticket.key], blocks, 0) for ticket in tickets)
            self._plan.stores.append(RequestCopies(request_id, copies))

    def finish(self, request_id: str) -> None:
        """The request is gone, in whatever way."""
        request = self._requests.pop(request_id, None)
        self.directory.unpin(request_id)
        if request is not None:
            for operation in request.loading:
                self._loading.pop(operation, None)

    # Plans and reports

    def take_plan(self) -> Plan:
        """The work of this step; the engine hands it to every rank."""
        self.directory.expire(self._clock())
        self._plan.tier_copies += [self._tier_copy(ticket) for ticket in self.directory.take_tickets()]
        plan, self._plan = self._plan, Plan()
        return plan

    def apply(self, report: Report) -> None:
        """Believe what the ranks report."""
        now = self._clock()
        self._causes.update(report.failed)
        for operation, ranks in report.finished.items():
            ended = self._ended.pop(operation, 0) + ranks
            if ended < self._world:
                self._ended[operation] = ended
                continue
            self._complete(operation, self._causes.pop(operation, None), now)
        for transfer, num_bytes, seconds in report.transfers:
            self.metrics.transferred_bytes.labels(transfer).inc(num_bytes)
            self.metrics.transfer_seconds.labels(transfer).observe(seconds)
        self._count_losses()

    def reset(self) -> bool:
        """Forget all chunks, in every tier. False if some are in use and stay."""
        return self.directory.clear() == 0

    def close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        if self._server is not None:
            self._server.close()

    # Inside

    def _leading_in_host(self, found: Found, first: int) -> int:
        """End of the run of chunks that can be loaded at once: those before `first` are the engine's own, the others must be in host."""
        end = min(first, found.num_chunks)
        while end < found.num_chunks and found.tiers[end] == HOST:
            end += 1
        return end

    def _wait_for_staging(
        self, request_id: str, request: _Request, keys: Sequence[ChunkKey], first: int, found: Found, now: float
    ) -> bool:
        wanted = keys[first : found.num_chunks]
        if request.deadline is None:
            request.deadline = now + self.config.load_deadline
            self.directory.pin(wanted, request_id, request.deadline + _PIN_GRACE_SECONDS)
            self._plan.tier_copies += [self._tier_copy(ticket) for ticket in self.directory.stage(wanted, now)]
        if not self.directory.arriving(wanted):
            return False
        if now >= request.deadline:
            self.metrics.waits.inc()
            return False
        return True

    def _storable(self, num_valid: int, num_prompt: int) -> int:
        return (num_valid if self.config.store_decode else min(num_valid, num_prompt)) // self.chunk_tokens

    def _block_copy(self, ticket: Ticket, index: int, blocks: Sequence[int], held: int) -> BlockCopy:
        start = index * self._blocks_per_chunk
        chosen = tuple(
            SKIP if number < held else blocks[number] for number in range(start, start + self._blocks_per_chunk)
        )
        return BlockCopy(ticket.operation, ticket.key, ticket.slot, chosen)

    def _tier_copy(self, ticket: Ticket) -> TierCopy:
        assert ticket.kind in ("write", "stage", "delete")
        return TierCopy(ticket.operation, ticket.kind, ticket.tier, ticket.key, ticket.slot, ticket.evict)

    def _complete(self, operation: int, cause: str | None, now: float) -> None:
        ticket = self.directory.complete(operation, cause, now)
        if ticket is None:
            return
        if cause is not None:
            self.metrics.failures.labels(ticket.kind).inc()
        elif ticket.kind == "store":
            self.metrics.stored_chunks.inc()
            self.metrics.stored_tokens.inc(self.chunk_tokens)
        elif ticket.kind == "write":
            self.metrics.written_chunks.labels(ticket.tier).inc()
        elif ticket.kind == "stage":
            self.metrics.staged_chunks.labels(ticket.tier).inc()
        if ticket.kind == "load":
            request = self._requests.get(self._loading.pop(operation, ""))
            if request is not None:
                index = request.loading.pop(operation)
                if cause is not None:
                    # The engine recomputes from here: store again from here, and do not offer the chunk to this request again.
                    request.stored = min(request.stored, index)
                    request.usable = min(request.usable, index)

    def _sources(self, request: _Request, first: int, last: int) -> dict[str, int]:
        """Tokens of chunks first..last, less what the engine holds, by the tier that held them when the request came."""
        assert request.found is not None
        tiers = request.found.tiers
        sources: dict[str, int] = {}
        covered = request.computed
        for index in range(first, last):
            end = (index + 1) * self.chunk_tokens
            tier = tiers[index] if index < len(tiers) else HOST
            sources[tier] = sources.get(tier, 0) + end - covered
            covered = end
        return sources

    def _count_lookup(self, request_id: str, request: _Request) -> None:
        self.metrics.requests.inc()
        self.metrics.lookup_tokens.inc(request.num_tokens)
        self.metrics.device_tokens.inc(request.computed)
        for tier, tokens in request.sources.items():
            self.metrics.hit_tokens.labels(tier).inc(tokens)
        if request.found is not None and request.found.miss is not None:
            self.metrics.misses.labels(request.found.miss).inc()
        if self._recorder is not None:
            hits = {DEVICE: request.computed, **request.sources}
            keys = request.chain.keys
            self._recorder.lookup(self._clock(), request_id, request.num_tokens, keys, request.tenant, hits)

    def _count_losses(self) -> None:
        counts = self.directory.counts
        for what, total in (("store", counts.stores_dropped), ("write", counts.writes_dropped)):
            if total > self._counted_drops[what]:
                self.metrics.dropped_chunks.labels(what).inc(total - self._counted_drops[what])
                self._counted_drops[what] = total
        for tier, total in counts.evicted.items():
            before = self._counted_evictions.get(tier, 0)
            if total > before:
                self.metrics.evicted_chunks.labels(tier).inc(total - before)
                self._counted_evictions[tier] = total

    def _open_directory(self, ready: Sequence[WorkerReady]) -> Directory:
        config, first = self.config, ready[0]
        capacity = {"disk": config.disk.capacity // (self.chunk_bytes * self._world)}
        below = {name: capacity[name] for name in first.stored if all(name in worker.stored for worker in ready)}
        for name, chunks in below.items():
            if chunks == 0:
                raise ConfigError(
                    f"{name}.capacity is smaller than one chunk of {self.chunk_bytes * self._world} bytes"
                )
        directory = Directory(
            min(worker.host_slots for worker in ready),
            below,
            get_policy(config.policy),
            write=config.write,
            write_touches=config.write_touches,
            ttl=config.ttl,
            queue_depth=config.queue_depth,
        )
        for name in below:
            everywhere = set.intersection(*(set(worker.stored[name]) for worker in ready))
            surplus = directory.restore(name, [key for key in first.stored[name] if key in everywhere], self._clock())
            halves = set.union(*(set(worker.stored[name]) for worker in ready)) - everywhere
            self._plan.tier_copies += [
                TierCopy(_NO_OPERATION, "delete", name, key, -1) for key in (*surplus, *sorted(halves))
            ]
        return directory

    def _open_server(self) -> MetricsServer | None:
        if not self.config.metrics.enabled:
            return None
        try:
            return MetricsServer(self.config.metrics, self.metrics.registry)
        except OSError as error:
            where = f"{self.config.metrics.host}:{self.config.metrics.port}"
            logger.warning("lmc: no metrics endpoint: cannot listen on %s: %s", where, error.strerror)
            return None

    def _open_recorder(self) -> TraceRecorder | None:
        if self.config.record is None:
            return None
        return TraceRecorder(
            self.config.record,
            chunk_tokens=self.chunk_tokens,
            chunk_bytes=self.chunk_bytes * self._world,
            namespace=self.namespace.label(),
            now=self._clock(),
        )


def describe_tiers(usage: Mapping[str, tuple[int, int]], chunk_bytes: int) -> str:
    """One line for people: "host 1.5 GiB (256 chunks), disk 100 GiB (17,000 chunks)"."""
    from lmc.units import format_count, format_size

    return ", ".join(
        f"{tier} {format_size(slots * chunk_bytes)} ({format_count(slots)} chunks)"
        for tier, (_, slots) in usage.items()
    )
