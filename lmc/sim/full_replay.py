"""Replays a trace through the live cache's own directory on a virtual clock: all tiers, write modes, TTL, N instances behind a router.

For whatever has no closed form. The directory is the real object; workers are channels with a bandwidth and a latency, one a tier and a
direction for each instance; the engine computes one prompt after the other. A request takes the live scheduler's steps: look up, wait
for chunks that must be staged into host memory (not beyond load_deadline), load, compute the rest, store. Decoding and batching are left
out. Without a cost model everything is instant, and hits alone are simulated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

import numpy as np

from lmc.cache.config import CacheConfig, quota_slots
from lmc.cache.directory import HOST, Directory, Ticket
from lmc.cache.keys import ChunkKey
from lmc.cache.policy import get_policy
from lmc.cache.tiers.format import stored_bytes
from lmc.errors import ConfigError
from lmc.sim.capacity import warn_small
from lmc.sim.cost import CostModel
from lmc.sim.router import Router, Routing
from lmc.sim.shared_store import SHARED, SharedStore
from lmc.sim.trace import Float64, Int64, Trace, Window

_ARRIVAL, _DERIVED = 1, 0  # at equal times, what follows from earlier requests comes before the next arrival
_PIN_GRACE_S = 60.0
LATE, ABSENT = "late", "absent"


@dataclass(frozen=True)
class Fleet:
    """What is simulated beside the settings of one cache."""

    instances: int = 1
    routing: Routing = "round-robin"
    shared_chunks: int = 0  # capacity of a tier that all instances share; 0: none
    cost: CostModel | None = None


@dataclass
class ReplayResult:
    trace: Trace
    hit_tokens: dict[str, Int64]  # by tier that held them at the lookup, (num_requests,)
    ttft_s: Float64  # (num_requests,), zeros without a cost model
    instance: Int64  # (num_requests,) who served it
    counts: Counter[str] = field(default_factory=Counter)  # evicted, dropped writes and stores, late loads

    def hits(self, window: Window) -> dict[str, int]:
        first = self.trace.first_request(window)
        return {tier: int(tokens[first:].sum()) for tier, tokens in self.hit_tokens.items()}

    def total_tokens(self, window: Window) -> int:
        return int(self.trace.input_tokens[self.trace.first_request(window) :].sum())


def replay(trace: Trace, config: CacheConfig, chunk_bytes: int, fleet: Fleet) -> ReplayResult:
    """The trace must be in chunks of the configured size (lmc.sim.trace.coarsen); chunk_bytes are those of one chunk over all ranks.

    Raises ConfigError when the settings cannot be simulated.
    """
    return _Replay(trace, config, chunk_bytes, fleet).run()


class _Clock:
    """Events in order of time; equal times in order of rank, then of scheduling."""

    def __init__(self) -> None:
        self.now = float("-inf")
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time: float, action: Callable[[], None], rank: int = _DERIVED) -> None:
        self._count += 1
        heappush(self._events, (max(time, self.now), rank, self._count, action))

    def run(self) -> None:
        while self._events:
            self.now, _, _, action = heappop(self._events)
            action()


class _Channel:
    """A link that serves one transfer after the other."""

    def __init__(self, bytes_per_s: float = float("inf"), latency_s: float = 0.0) -> None:
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._free = float("-inf")

    def send(self, now: float, num_bytes: int) -> float:
        """When the transfer is done."""
        self._free = max(now, self._free) + num_bytes / self._bytes_per_s
        return self._free + self._latency_s


@dataclass
class _Request:
    index: int
    arrival_s: float
    keys: list[ChunkKey]
    usable: int  # chunks that may be loaded: never the whole prompt
    tenant: str
    found: tuple[str, ...] = ()
    staging: int = 0  # operations it waits for
    started: bool = False


class _Instance:
    def __init__(self, number: int, replay: _Replay) -> None:
        self.number = number
        self._replay = replay
        config = replay.config
        self.directory = Directory(
            replay.host_slots,
            {"disk": replay.disk_slots} if replay.disk_slots else {},
            get_policy(config.policy),
            remote=(SHARED,) if replay.store is not None else (),
            write=config.write,
            write_touches=config.write_touches,
            ttl=config.ttl,
            ttl_mode=config.ttl_mode,
            tenant_quota=quota_slots(config.tenant_quota, replay.host_slots, replay.chunk_bytes),
            queue_depth=config.queue_depth,
        )
        self._reading = {name: replay.channel(name) for name in (HOST, "disk", SHARED)}
        self._writing = {name: replay.channel(name) for name in (HOST, "disk", SHARED)}
        self._engine_free = float("-inf")
        self._waiting: dict[int, _Request] = {}  # stage operation -> request

    def arrive(self, request: _Request) -> None:
        now = self._replay.clock.now
        self.directory.expire(now)
        self._ask_shared(request)
        request.found = self.directory.lookup(request.keys[: request.usable], now).tiers
        below = next((index for index, tier in enumerate(request.found) if tier != HOST), None)
        if below is None:
            self._start(request)
            return
        wanted = request.keys[: len(request.found)]
        deadline = now + self._replay.config.load_deadline
        self.directory.pin(wanted, str(request.index), deadline + _PIN_GRACE_S)
        tickets = self.directory.stage(wanted, now)
        request.staging = len(tickets)
        self._waiting.update((ticket.operation, request) for ticket in tickets)
        for ticket in tickets:
            self._transfer(ticket, self._reading[ticket.tier])
        self._drain()
        if request.staging == 0:
            self._start(request)
        else:
            self._replay.clock.at(deadline, lambda: self._give_up_waiting(request))

    def _ask_shared(self, request: _Request) -> None:
        store = self._replay.store
        if store is not None:
            asked = request.keys[: request.usable]
            self.directory.learn(SHARED, asked, [key in store for key in asked])

    def _give_up_waiting(self, request: _Request) -> None:
        if not request.started:
            self._replay.counts[LATE] += 1
            self._start(request)

    def _start(self, request: _Request) -> None:
        """Load what is in host now; the engine takes the request in when the load is done."""
        request.started = True
        now = self._replay.clock.now
        found = self.directory.lookup(request.keys[: request.usable], now).tiers
        in_host = next((index for index, tier in enumerate(found) if tier != HOST), len(found))
        if in_host * self._replay.trace.block_tokens < self._replay.config.min_load_tokens:
            in_host = 0
        loads = self.directory.load(request.keys[:in_host]) if in_host else []
        self.directory.unpin(str(request.index))
        self._replay.note_hits(request, in_host)
        ready = self._reading[HOST].send(now, len(loads) * self._replay.chunk_bytes) if loads else now
        self._replay.clock.at(ready, lambda: self._compute(request, loads))

    def _compute(self, request: _Request, loads: Sequence[Ticket]) -> None:
        now = self._replay.clock.now
        for ticket in loads:
            self.directory.complete(ticket.operation, None, now)
        begin = max(now, self._engine_free)
        self._engine_free = begin + self._replay.prefill_s(request.index, len(loads))
        self._replay.clock.at(self._engine_free, lambda: self._computed(request))

    def _computed(self, request: _Request) -> None:
        now = self._replay.clock.now
        self._replay.ttft_s[request.index] = now - request.arrival_s
        for ticket in self.directory.store(request.keys, now, tenant=request.tenant):
            self._transfer(ticket, self._writing[HOST])
        self._drain()

    def _drain(self) -> None:
        for ticket in self.directory.take_tickets():
            if ticket.kind == "delete":
                self._done(ticket)
            else:
                self._transfer(ticket, self._writing[ticket.tier])

    def _transfer(self, ticket: Ticket, channel: _Channel) -> None:
        done = channel.send(self._replay.clock.now, self._replay.chunk_bytes)
        self._replay.clock.at(done, lambda: self._done(ticket))

    def _done(self, ticket: Ticket) -> None:
        store, now = self._replay.store, self._replay.clock.now
        failure = None
        if ticket.tier == SHARED and store is not None:
            if ticket.kind == "write":
                store.put(ticket.key)
            elif ticket.kind == "stage" and not store.get(ticket.key):
                failure = ABSENT
        self.directory.complete(ticket.operation, failure, now)
        request = self._waiting.pop(ticket.operation, None)
        self._drain()
        if request is not None:
            request.staging -= 1
            if request.staging == 0 and not request.started:
                self._start(request)


class _Replay:
    def __init__(self, trace: Trace, config: CacheConfig, chunk_bytes: int, fleet: Fleet) -> None:
        self.trace = trace
        self.config = config
        self.chunk_bytes = chunk_bytes
        self.fleet = fleet
        self.host_slots = _slots(config.host.capacity, chunk_bytes, "host.capacity")
        self.disk_slots = (
            _slots(config.disk.capacity, stored_bytes(chunk_bytes), "disk.capacity") if config.disk.path else 0
        )
        self.store = SharedStore(fleet.shared_chunks) if fleet.shared_chunks else None
        self.clock = _Clock()
        self.counts: Counter[str] = Counter()
        self.ttft_s = np.zeros(trace.num_requests)
        tiers = [HOST, *(["disk"] if self.disk_slots else []), *([SHARED] if self.store is not None else [])]
        self.hit_tokens = {tier: np.zeros(trace.num_requests, dtype=np.int64) for tier in tiers}
        self._keys = [ChunkKey(number.to_bytes(32, "big")) for number in range(trace.num_unique)]

    def run(self) -> ReplayResult:
        trace, clock = self.trace, self.clock
        instances = [_Instance(number, self) for number in range(self.fleet.instances)]
        router = Router(self.fleet.routing, self.fleet.instances)
        served = np.zeros(trace.num_requests, dtype=np.int64)

        def arrive(index: int) -> None:
            request = self._request(index)
            chosen = router.choose(request.keys, int(trace.input_tokens[index]))
            served[index] = chosen
            if index + 1 < trace.num_requests:
                clock.at(float(trace.timestamps_s[index + 1]), lambda: arrive(index + 1), _ARRIVAL)
            instances[chosen].arrive(request)

        clock.at(float(trace.timestamps_s[0]), lambda: arrive(0), _ARRIVAL)
        clock.run()
        for instance in instances:
            counts = instance.directory.counts
            self.counts.update({f"evicted from {tier}": total for tier, total in counts.evicted.items()})
            self.counts.update({"stores dropped": counts.stores_dropped, "writes dropped": counts.writes_dropped})
        trace = replace(trace, notes=(*trace.notes, *warn_small(trace, [self.host_slots])))
        return ReplayResult(trace, self.hit_tokens, self.ttft_s, served, self.counts)

    def channel(self, tier: str) -> _Channel:
        cost = self.fleet.cost
        if cost is None:
            return _Channel()
        return (
            _Channel(cost.tier(tier).bytes_per_s, cost.tier(tier).latency_s) if tier in self.hit_tokens else _Channel()
        )

    def prefill_s(self, index: int, num_hit: int) -> float:
        if self.fleet.cost is None:
            return 0.0
        hits = np.array([num_hit * self.trace.block_tokens], dtype=np.int64)
        return float(self.fleet.cost.prefill.seconds(hits, self.trace.input_tokens[index : index + 1] - hits)[0])

    def note_hits(self, request: _Request, num_chunks: int) -> None:
        """Count loaded chunks under the tier that held them when the request came."""
        for position in range(num_chunks):
            tier = request.found[position] if position < len(request.found) else HOST
            self.hit_tokens[tier][request.index] += self.trace.block_tokens

    def _request(self, index: int) -> _Request:
        trace = self.trace
        ids = trace.ids[trace.starts[index] : trace.starts[index + 1]].tolist()
        usable = min(len(ids), max(int(trace.input_tokens[index]) - 1, 0) // trace.block_tokens)
        keys = [self._keys[block] for block in ids]
        return _Request(index, float(trace.timestamps_s[index]), keys, usable, trace.tenant_names[trace.tenants[index]])


def _slots(capacity: int | str, chunk_bytes: int, key: str) -> int:
    if isinstance(capacity, str):
        raise ConfigError(f"{key} is {capacity} of a machine that is not here; give a size such as 64GiB to simulate")
    if capacity < chunk_bytes:
        raise ConfigError(
            f"{key} of {capacity} bytes holds no chunk of {chunk_bytes} bytes; raise it or lower chunk_tokens"
        )
    return capacity // chunk_bytes
