"""Replays a trace through the live cache's own directory on a virtual clock: all tiers, write modes, TTL, N instances behind a router.

The directory and the life of each request (lmc.cache.directory) are the live objects. The rest is modelled: workers are channels with a
bandwidth and a latency, one for each tier, direction and instance; the engine computes one prompt after the other. Decoding and batching
are left out. Without a cost model every transfer is instant, and only hits are simulated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

import numpy as np

from lmc.cache.config import CacheConfig
from lmc.cache.directory import HOST, Miss, Request, Ticket, build_directory
from lmc.cache.directory.holds import ABSENT, LATE
from lmc.cache.directory.remote import leading
from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.format import stored_bytes
from lmc.errors import ConfigError
from lmc.sim.capacity import warn_small
from lmc.sim.cost import CostModel
from lmc.sim.router import Router, Routing
from lmc.sim.shared_store import SHARED, SharedStore
from lmc.sim.trace import Float64, Int64, Trace, Window

_DERIVED, _STEP, _COMPUTED, _ARRIVAL = range(
    4
)  # at equal times: copies end, schedulers step, prompts are computed, one arrives


@dataclass(frozen=True)
class Fleet:
    """What is simulated beside the settings of one cache."""

    instances: int = 1
    routing: Routing = "round-robin"
    shared_chunks: int = 0  # capacity of each tier that all instances share; 0: there is none
    shared_names: tuple[str, ...] = (SHARED,)  # of these tiers, fastest first
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


def replay_fleet(trace: Trace, config: CacheConfig, chunk_bytes: int, fleet: Fleet) -> ReplayResult:
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
class _Arrival:
    """A request of the trace, and its life in the instance that serves it."""

    index: int
    keys: list[ChunkKey]
    num_tokens: int
    arrival_s: float
    life: Request
    missing: set[ChunkKey] = field(default_factory=set)  # chunks on their way into host memory, for which it waits
    started: bool = False


class _Instance:
    def __init__(self, replay: _Replay) -> None:
        self._replay = replay
        self.directory = build_directory(
            replay.config,
            replay.host_slots,
            replay.chunk_bytes,
            below={"disk": replay.disk_slots} if replay.disk_slots else {},
            remote=tuple(replay.stores),
        )
        self._reading = {name: replay.channel(name) for name in replay.hit_tokens}
        self._writing = {name: replay.channel(name) for name in replay.hit_tokens}
        self._engine_free = float("-inf")
        self._waiting: dict[int, _Arrival] = {}
        self._stages: list[Ticket] = []  # this and the next two begin in the next step
        self._stores: list[Ticket] = []
        self._admitted: list[tuple[_Arrival, list[Ticket]]] = []
        self._step_due = False

    def arrive(self, index: int, keys: list[ChunkKey]) -> None:
        replay, trace = self._replay, self._replay.trace
        now = replay.clock.now
        self.directory.expire(now)
        tenant = trace.tenant_names[trace.tenants[index]]
        life = Request(str(index), self.directory, replay.config, trace.block_tokens, tenant, now)
        arrival = _Arrival(index, keys, int(trace.input_tokens[index]), float(trace.timestamps_s[index]), life)
        self._look_up(arrival)
        if not arrival.started and life.deadline is not None:
            replay.clock.at(life.deadline, lambda: self._look_up(arrival))

    def _look_up(self, arrival: _Arrival) -> None:
        """Start the request, or wait for the chunks that are on their way into host memory."""
        if arrival.started:
            return
        life, now = arrival.life, self._replay.clock.now
        gain = life.lookup(arrival.keys, arrival.num_tokens, 0, now)
        if question := life.take_question():
            self._answer(question)
            life.answer(failed=False)
            gain = life.lookup(arrival.keys, arrival.num_tokens, 0, now)
        self._stages += life.take_tickets()
        self._step_soon()
        if gain is None:
            arrival.missing = set(life.arriving())
            self._waiting[arrival.index] = arrival
        else:
            self._waiting.pop(arrival.index, None)
            self._start(arrival, gain)

    def _answer(self, asked: Sequence[ChunkKey]) -> None:
        for name, store in self._replay.stores.items():
            self.directory.learn(name, *leading(asked, store.contains))

    def _start(self, arrival: _Arrival, gain: int) -> None:
        """Load what is in host now; the engine takes the request in when the load is done."""
        arrival.started = True
        replay, life = self._replay, arrival.life
        if life.miss() == Miss.LOAD_DEADLINE:
            replay.counts[LATE] += 1
        loads = life.load(gain)
        for tier, tokens in life.sources.items():
            replay.hit_tokens[tier][arrival.index] = tokens
        self._admitted.append((arrival, loads))
        self._step_soon()

    def _compute(self, arrival: _Arrival, loads: Sequence[Ticket]) -> None:
        now = self._replay.clock.now
        for ticket in loads:
            self.directory.complete(ticket.operation, None, now)
            arrival.life.loaded(ticket.operation, None)
        begin = max(now, self._engine_free)
        self._engine_free = begin + self._replay.prefill_s(arrival.index, len(loads))
        self._replay.clock.at(self._engine_free, lambda: self._computed(arrival), _COMPUTED)

    def _computed(self, arrival: _Arrival) -> None:
        replay, now = self._replay, self._replay.clock.now
        replay.ttft_s[arrival.index] = now - arrival.arrival_s
        num_stored = len(arrival.keys) * replay.trace.block_tokens
        self._stores += arrival.life.store(arrival.keys, num_stored, num_stored, now)
        arrival.life.end()
        self._step_soon()

    def _step_soon(self) -> None:
        """Step once when all that ends at this time has ended: the live scheduler learns of it in one report."""
        if not self._step_due:
            self._step_due = True
            self._replay.clock.at(self._replay.clock.now, self._step, _STEP)

    def _step(self) -> None:
        """What a step of the live scheduler does: ask again for requests that waited, remove what has expired, hand out tickets."""
        self._step_due = False
        now = self._replay.clock.now
        for arrival in [arrival for arrival in self._waiting.values() if not arrival.missing]:
            self._look_up(arrival)
        self.directory.expire(now)
        due = self.directory.take_tickets()
        for ticket in due:
            if ticket.kind == "delete":
                self._done(ticket)
        stages, self._stages = self._stages, []
        admitted, self._admitted = self._admitted, []
        stores, self._stores = self._stores, []
        for ticket in stages:
            self._transfer(ticket, self._reading[ticket.tier])
        for arrival, loads in admitted:
            self._load(arrival, loads)
        for ticket in stores:
            self._transfer(ticket, self._writing[HOST])
        for ticket in due:
            if ticket.kind != "delete":
                self._transfer(ticket, self._writing[ticket.tier])

    def _load(self, arrival: _Arrival, loads: Sequence[Ticket]) -> None:
        clock = self._replay.clock
        ready = clock.now
        if loads:
            ready = self._reading[HOST].send(ready, len(loads) * self._replay.chunk_bytes)
        clock.at(ready, lambda: self._compute(arrival, loads))

    def _transfer(self, ticket: Ticket, channel: _Channel) -> None:
        done = channel.send(self._replay.clock.now, self._replay.chunk_bytes)
        self._replay.clock.at(done, lambda: self._done(ticket))

    def _done(self, ticket: Ticket) -> None:
        store, now = self._replay.stores.get(ticket.tier), self._replay.clock.now
        failure = None
        if store is not None:
            if ticket.kind == "write":
                store.put(ticket.key)
            elif ticket.kind == "stage" and not store.get(ticket.key):
                failure = ABSENT
        self.directory.complete(ticket.operation, failure, now)
        if ticket.kind == "stage":
            for arrival in self._waiting.values():
                arrival.missing.discard(ticket.key)
        self._step_soon()


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
        names = fleet.shared_names if fleet.shared_chunks else ()
        self.stores = {name: SharedStore(fleet.shared_chunks) for name in names}
        self.clock = _Clock()
        self.counts: Counter[str] = Counter()
        self.ttft_s = np.zeros(trace.num_requests)
        tiers = [HOST, *(["disk"] if self.disk_slots else []), *self.stores]
        self.hit_tokens = {tier: np.zeros(trace.num_requests, dtype=np.int64) for tier in tiers}
        self._keys = [ChunkKey(number.to_bytes(32, "big")) for number in range(trace.num_unique)]

    def run(self) -> ReplayResult:
        trace, clock = self.trace, self.clock
        instances = [_Instance(self) for _ in range(self.fleet.instances)]
        router = Router(self.fleet.routing, self.fleet.instances)
        served = np.zeros(trace.num_requests, dtype=np.int64)

        def arrive(index: int) -> None:
            keys = [self._keys[number] for number in trace.ids[trace.starts[index] : trace.starts[index + 1]].tolist()]
            chosen = router.choose(keys, int(trace.input_tokens[index]))
            served[index] = chosen
            if index + 1 < trace.num_requests:
                clock.at(float(trace.timestamps_s[index + 1]), lambda: arrive(index + 1), _ARRIVAL)
            instances[chosen].arrive(index, keys)

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
        link = cost.tier(SHARED if tier in self.stores and tier not in cost.tiers else tier)
        return _Channel(link.bytes_per_s, link.latency_s)

    def prefill_s(self, index: int, num_hit: int) -> float:
        if self.fleet.cost is None:
            return 0.0
        hits = np.array([num_hit * self.trace.block_tokens], dtype=np.int64)
        return float(self.fleet.cost.prefill.seconds(hits, self.trace.input_tokens[index : index + 1] - hits)[0])


def _slots(capacity: int | str, chunk_bytes: int, key: str) -> int:
    if isinstance(capacity, str):
        raise ConfigError(f"{key} is {capacity} of a machine that is not here; give a size such as 64GiB to simulate")
    if capacity < chunk_bytes:
        raise ConfigError(
            f"{key} of {capacity} bytes holds no chunk of {chunk_bytes} bytes; raise it or lower chunk_tokens"
        )
    return capacity // chunk_bytes
