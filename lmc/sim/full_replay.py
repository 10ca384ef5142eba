"""Replays a trace through the live cache's own directory on a virtual clock: all tiers, write modes, TTL, N instances behind a router.

The directory and the life of each request (lmc.cache.directory) are the live objects. The rest is modelled: workers are channels with a
bandwidth and a latency, one for each tier, direction and instance, and the engine computes requests step by step (lmc.sim.engine_steps).
Without a cost model every transfer and every step is instant, and only hits are simulated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

import numpy as np

from lmc.cache.config import CacheConfig
from lmc.cache.directory import HOST, Capacity, Directory, Miss, Request, Ticket, Told, build_directory, capacity_of
from lmc.cache.directory.holds import ABSENT, LATE
from lmc.cache.directory.remote import leading
from lmc.cache.keys import ChunkKey
from lmc.cache.parts import Parts, Step
from lmc.cache.policy.base import MOST_CLASSES
from lmc.cache.tiers.format import stored_bytes
from lmc.errors import ConfigError
from lmc.sim.capacity import warn_small
from lmc.sim.compression import NO_CODEC, Codec
from lmc.sim.cost import CostModel
from lmc.sim.engine_model import DEVICE, WHOLE_PROMPTS, EngineModel
from lmc.sim.engine_steps import Engine, Run
from lmc.sim.router import Router, Routing
from lmc.sim.shared_store import SHARED, SharedStore
from lmc.sim.trace import Float64, Int64, Trace, Window

DISK = "disk"
# At equal times copies end, schedulers step, prompts are computed, and then a request arrives.
_DERIVED, _STEP, _COMPUTED, _ARRIVAL = range(4)


@dataclass(frozen=True)
class Fleet:
    """What is simulated beside the settings of one cache."""

    instances: int = 1
    routing: Routing = "round-robin"
    shared_chunks: int = 0  # capacity of each tier that all instances share; 0: there is none
    shared_names: tuple[str, ...] = (SHARED,)  # of these tiers, fastest first
    cost: CostModel | None = None
    codec: Codec = NO_CODEC  # of the disk
    shared_host: bool = False  # all instances use one directory (lmc node), with the memory and the disk of all
    parts: Parts | None = None  # of a model with several kinds of KV, with the bytes of a part of each
    part_bytes: tuple[int, ...] = ()

    @property
    def engine(self) -> EngineModel:
        return WHOLE_PROMPTS if self.cost is None else self.cost.engine


@dataclass
class ReplayResult:
    trace: Trace
    hit_tokens: dict[str, Int64]  # by tier that held them at the lookup, (num_requests,)
    ttft_s: Float64  # (num_requests,), zeros without a cost model
    instance: Int64  # (num_requests,) who served it
    engine: EngineModel = WHOLE_PROMPTS
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


class _Instance:
    """An engine and the cache below it."""

    def __init__(self, replay: _Replay, directory: Directory, sharing: list[_Instance]) -> None:
        """sharing: all instances that use this directory; this one adds itself."""
        self._replay = replay
        self.directory = directory
        self._sharing = sharing
        sharing.append(self)
        self._reading = {name: replay.channel(name) for name in replay.cached}
        self._writing = {name: replay.channel(name) for name in replay.cached}
        fleet = replay.fleet
        prefill = fleet.cost.prefill if fleet.cost is not None else None
        self.engine = Engine(fleet.engine, prefill, replay.trace.block_tokens, self)
        self._lives: dict[int, Request] = {}
        self._missing: dict[
            int, tuple[Run, set[ChunkKey]]
        ] = {}  # chunks on their way into host memory, by the request that waits
        self._stages: list[Ticket] = []  # this and the next begin in the next step
        self._stores: list[Ticket] = []
        self._step_due = False

    def arrive(self, index: int, keys: list[ChunkKey]) -> None:
        trace = self._replay.trace
        self.engine.add(Run(index, keys, int(trace.input_tokens[index]), int(trace.output_tokens[index])))

    def now(self) -> float:
        return self._replay.clock.now

    def at(self, time: float, action: Callable[[], None]) -> None:
        self._replay.clock.at(time, action)

    def at_computed(self, time: float, action: Callable[[], None]) -> None:
        self._replay.clock.at(time, action, _COMPUTED)

    def step_soon(self) -> None:
        """Step once when all that ends at this time has ended: the live scheduler learns of it in one report."""
        if not self._step_due:
            self._step_due = True
            self._replay.clock.at(self.now(), self._step, _STEP)

    def look_up(self, run: Run, computed: int) -> int | None:
        replay, trace, now = self._replay, self._replay.trace, self.now()
        if run.index not in self._lives:
            self.directory.expire(now)
            tenant = trace.tenant_names[trace.tenants[run.index]]
            told = Told(min(int(trace.classes[run.index]), MOST_CLASSES))
            self._lives[run.index] = Request(
                str(run.index),
                self.directory,
                replay.config,
                trace.block_tokens,
                tenant,
                now,
                replay.fleet.parts,
                told,
            )
        life = self._lives[run.index]
        gain = life.lookup(run.keys, run.num_tokens, computed, now)
        while question := life.take_question():
            for name, store in replay.stores.items():
                every = life.asks_for_leaves
                answer = (question, store.contains(question)) if every else leading(question, store.contains)
                self.directory.learn(name, *answer)
            life.answer(failed=False)
            gain = life.lookup(run.keys, run.num_tokens, computed, now)
        self._stages += life.take_tickets()
        if gain is None:
            self._missing[run.index] = (run, set(life.arriving()))
            if life.deadline is not None:
                replay.clock.at(life.deadline, lambda: self._ready(run.index))
        return gain

    def _ready(self, index: int) -> None:
        if index in self._missing:
            run, _ = self._missing.pop(index)
            self.engine.ready(run)

    def load(self, run: Run, tokens: int) -> Sequence[Ticket]:
        replay, life = self._replay, self._lives[run.index]
        first = not life.admitted
        if first and life.miss() == Miss.LOAD_DEADLINE:
            replay.counts[LATE] += 1
        loads = [ticket for _, ticket in life.load(tokens)]
        if first:
            for tier, found in life.sources.items():
                replay.hit_tokens[tier][run.index] = found
            if life.computed:
                replay.hit_tokens[DEVICE][run.index] = life.computed
        return loads

    def send_loads(self, tickets: Sequence[Ticket]) -> float:
        if not tickets:
            return self.now()
        num_bytes = sum(self._replay.part_bytes[ticket.group] for ticket in tickets)
        done = self._reading[HOST].send(self.now(), num_bytes)
        self.directory.speeds.loaded(len(tickets), done - self.now())
        return done

    def loaded(self, run: Run, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self.directory.complete(ticket.operation, None, self.now())
            self._lives[run.index].loaded(ticket.operation, None)

    def computed(self, parts: Sequence[tuple[int, int]], seconds: float) -> None:
        self.directory.speeds.computed(parts, seconds)

    def store(self, run: Run, num_before: int, num_valid: int) -> None:
        num_prompt = len(run.keys) * self._replay.trace.block_tokens
        valid = num_prompt if num_valid >= run.num_tokens else min(num_valid, num_prompt)
        if self._replay.fleet.parts is not None:  # where a prompt ends decides about its checkpoints
            valid, num_prompt = min(num_valid, run.num_tokens), run.num_tokens
        stored = self._lives[run.index].store(run.keys, valid, num_prompt, self.now(), Step(num_before))
        self._stores += [ticket for _, ticket in stored]

    def first_token(self, run: Run) -> None:
        self._replay.ttft_s[run.index] = self.now() - float(self._replay.trace.timestamps_s[run.index])

    def end(self, run: Run) -> None:
        self._lives.pop(run.index).end()

    def _step(self) -> None:
        """What a step of the live scheduler does: take requests in, remove what has expired, hand out tickets."""
        self._step_due = False
        self.engine.step()
        self.directory.expire(self.now())
        due = self.directory.take_tickets()
        for ticket in due:
            if ticket.kind == "delete":
                self._done(ticket)
        stages, self._stages = self._stages, []
        stores, self._stores = self._stores, []
        for ticket in stages:
            self._transfer(ticket, self._reading[ticket.tier])
        self.engine.launch()
        stored = [self._transfer(ticket, self._writing[HOST]) for ticket in stores]
        self.engine.stored(max(stored, default=self.now()))
        for ticket in due:
            if ticket.kind != "delete":
                self._transfer(ticket, self._writing[ticket.tier])

    def _transfer(self, ticket: Ticket, channel: _Channel) -> float:
        replay = self._replay
        codec = replay.fleet.codec if ticket.tier == DISK else NO_CODEC
        size = replay.part_bytes[ticket.group]
        done = channel.send(self.now(), codec.stored(size)) + size / codec.bytes_per_s
        replay.clock.at(done, lambda: self._done(ticket))
        return done

    def _done(self, ticket: Ticket) -> None:
        store = self._replay.stores.get(ticket.tier)
        failure = None
        if store is not None:
            if ticket.kind == "write":
                store.put(ticket.key)
            elif ticket.kind == "stage" and not store.get(ticket.key):
                failure = ABSENT
        is_write = ticket.kind == "write" and ticket.tier == DISK
        self.directory.complete(ticket.operation, failure, self.now(), self._replay.saved if is_write else 0)
        if ticket.kind == "stage":
            for instance in self._sharing:
                instance._arrived(ticket.key, failed=failure is not None)
        self.step_soon()

    def _arrived(self, key: ChunkKey, *, failed: bool) -> None:
        """A chunk is in host memory, or will not be. Who waited for it may go on, or need not wait for those behind it any more."""
        for index, (_, missing) in list(self._missing.items()):
            if failed and key in missing:
                missing.clear()
            missing.discard(key)
            if not missing:
                self._ready(index)


class _Replay:
    def __init__(self, trace: Trace, config: CacheConfig, chunk_bytes: int, fleet: Fleet) -> None:
        self.trace = trace
        self.config = config
        self.chunk_bytes = chunk_bytes
        self.part_bytes = fleet.part_bytes or (chunk_bytes,)
        self.fleet = fleet
        sharing = fleet.instances if fleet.shared_host else 1
        self.host_slots = _slots(config.host.capacity, chunk_bytes, "host.capacity") * sharing
        self.disk: Capacity | None = None
        if config.disk.path:
            file_bytes = stored_bytes(chunk_bytes)
            _slots(config.disk.capacity, file_bytes, "disk.capacity")
            self.disk = capacity_of(config.disk.capacity * sharing, file_bytes, config.disk.compress)
        self.saved = chunk_bytes - fleet.codec.stored(chunk_bytes)
        names = fleet.shared_names if fleet.shared_chunks else ()
        self.stores = {name: SharedStore(fleet.shared_chunks) for name in names}
        self.clock = _Clock()
        self.counts: Counter[str] = Counter()
        self.ttft_s = np.zeros(trace.num_requests)
        self.cached = [HOST, *([DISK] if self.disk is not None else []), *self.stores]  # the tiers of the cache
        engine = fleet.engine
        own = [DEVICE] if engine.kv_tokens is not None and engine.prefix_cache else []
        self.hit_tokens = {tier: np.zeros(trace.num_requests, dtype=np.int64) for tier in (*own, *self.cached)}
        # The last byte stays free: it names the parts of a chunk.
        self._keys = [ChunkKey((number << 8).to_bytes(32, "big")) for number in range(trace.num_unique)]

    def run(self) -> ReplayResult:
        trace, clock = self.trace, self.clock
        instances = self._open()
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
            if instance.engine.preempted:
                self.counts["preempted"] += instance.engine.preempted
        for counts in [one.directory.counts for one in (instances[:1] if self.fleet.shared_host else instances)]:
            self.counts.update({f"evicted from {tier}": total for tier, total in counts.evicted.items()})
            self.counts.update({"stores dropped": counts.stores_dropped, "writes dropped": counts.writes_dropped})
        trace = replace(trace, notes=(*trace.notes, *warn_small(trace, [self.host_slots])))
        return ReplayResult(trace, self.hit_tokens, self.ttft_s, served, self.fleet.engine, self.counts)

    def _open(self) -> list[_Instance]:
        if self.fleet.shared_host:
            directory, sharing = self._directory(), list[_Instance]()
            return [_Instance(self, directory, sharing) for _ in range(self.fleet.instances)]
        return [_Instance(self, self._directory(), []) for _ in range(self.fleet.instances)]

    def _directory(self) -> Directory:
        below = {DISK: self.disk} if self.disk is not None else {}
        return build_directory(self.config, self.host_slots, self.chunk_bytes, below=below, remote=tuple(self.stores))

    def channel(self, tier: str) -> _Channel:
        cost = self.fleet.cost
        if cost is None:
            return _Channel()
        link = cost.tier(SHARED if tier in self.stores and tier not in cost.tiers else tier)
        return _Channel(link.bytes_per_s, link.latency_s)


def _slots(capacity: int | str, chunk_bytes: int, key: str) -> int:
    if isinstance(capacity, str):
        raise ConfigError(f"{key} is {capacity} of a machine that is not here; give a size such as 64GiB to simulate")
    if capacity < chunk_bytes:
        raise ConfigError(
            f"{key} of {capacity} bytes holds no chunk of {chunk_bytes} bytes; raise it or lower chunk_tokens"
        )
    return capacity // chunk_bytes
