"""The same for `load: auto`, which decides by times: the live scheduler and the replay measure the same ones, and choose alike.

Live, the workers and the engine are this file's: they take as long as the replay's cost model says, on a clock of their own. All
decisions are the live scheduler's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.config import CacheConfig
from lmc.cache.directory import HOST, Ticket
from lmc.cache.plan import Plan, Report
from lmc.cache.scheduler.cache import Identity
from lmc.sim import full_replay
from lmc.sim.build import TraceBuilder
from lmc.sim.cost import CostModel, Prefill, TierCost
from lmc.sim.full_replay import Fleet
from lmc.sim.shared_store import SHARED
from tests.sim.test_agrees_with_live import (
    CHUNK_BYTES,
    CHUNK_TOKENS,
    SHARED_LIVE,
    Live,
    Prompt,
    Tiers,
    configured,
    prompts,
)

APART = 10_000.0  # seconds: all copies of a request have ended before the next one comes
FRESH = 4  # chunks that end a prompt and no other has: a pass is measured from so many on


@dataclass
class TimedLive(Live):
    cost: CostModel = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reading = {tier: self._channel(tier) for tier in (HOST, "disk", SHARED_LIVE)}
        self._writing = {tier: self._channel(tier) for tier in (HOST, "disk", SHARED_LIVE)}
        self._ends: list[tuple[float, int, Ticket]] = []  # copies under way

    def _channel(self, tier: str) -> full_replay._Channel:
        link = self.cost.tier(SHARED if tier == SHARED_LIVE else tier)
        return full_replay._Channel(link.bytes_per_s, link.latency_s)

    def serve(self, number: int, prompt: Prompt) -> None:
        scheduler, name, self.now = self.scheduler, f"r{number}", prompt.at
        tokens = [chunk for chunk in prompt.chunks for _ in range(CHUNK_TOKENS)] + [0] * prompt.rest
        until = time.monotonic() + 120
        while (gain := scheduler.lookup(name, tokens, 0, Identity(tenant=f"tenant {prompt.tenant}"))) is None:
            self._begin(scheduler.take_plan())
            deadline = scheduler._requests[name].request.deadline
            if deadline is None:
                time.sleep(0.0002)  # the shared tier answers on a thread
            elif not self._ends or self._ends[0][0] > deadline:
                self.now = deadline
            else:
                self._next_end()
            assert time.monotonic() < until, "the lookup never ended"
        blocks = range(len(prompt.chunks))
        scheduler.admit(name, gain, blocks)
        self.hits.append({tier: tokens for tier, tokens in scheduler.loaded_from(name).items() if tokens})
        begin = self._begin(scheduler.take_plan())
        self._advance(begin)
        seconds = self.cost.engine.step_s(self.cost.prefill, [(gain, len(tokens) - gain)], [])
        self._advance(begin + seconds)
        scheduler.computed([(gain, len(tokens) - gain)], seconds)
        scheduler.store(name, tokens, len(tokens), len(tokens), blocks)
        scheduler.finish(name)
        self._begin(scheduler.take_plan())
        while self._ends:
            self._next_end()
        scheduler.directory.check()

    def _begin(self, plan: Plan) -> float:
        """Start the copies of a plan, in the replay's order. Returns when those into the engine's blocks are done, which it waits for."""
        tickets = [copy.ticket for copy in plan.tier_copies]
        self._apply(ticket for ticket in tickets if ticket.kind == "delete")
        for ticket in tickets:
            if ticket.kind == "stage":
                self._send(ticket, self._reading[ticket.tier])
        begin = self.now
        for request in (*plan.loads, *plan.background_loads):
            begin = self._reading[HOST].send(self.now, len(request.chunks) * CHUNK_BYTES)
            load = (len(request.chunks) * CHUNK_BYTES, begin - self.now)
            finished = Counter(chunk.operation for chunk in request.chunks)
            self.scheduler.apply(Report(finished=finished, loads={request.request_id: load}))
        for request in plan.stores:
            for chunk in request.chunks:
                self._send(Ticket(chunk.operation, "store", chunk.key, HOST, chunk.slot), self._writing[HOST])
        for ticket in tickets:
            if ticket.kind == "write":
                self._send(ticket, self._writing[ticket.tier])
        return begin

    def _send(self, ticket: Ticket, channel: full_replay._Channel) -> None:
        heappush(self._ends, (channel.send(self.now, CHUNK_BYTES), ticket.operation, ticket))

    def _advance(self, to: float) -> None:
        while self._ends and self._ends[0][0] <= to:
            self._next_end()
        self.now = to

    def _next_end(self) -> None:
        """What ends next ends, with all that ends at the same time."""
        self.now = self._ends[0][0]
        ended = []
        while self._ends and self._ends[0][0] == self.now:
            ended.append(heappop(self._ends)[2])
        self._apply(ended)
        self._begin(self.scheduler.take_plan())

    def _apply(self, tickets: Iterable[Ticket]) -> None:
        report = Report()
        for ticket in tickets:
            report.finished[ticket.operation] = 1
            if (failure := self._copy(ticket)) is not None:
                report.failed[ticket.operation] = failure
        self.scheduler.apply(report)


def live(made: Sequence[Prompt], config: CacheConfig, tiers: Tiers, cost: CostModel) -> list[dict[str, int]]:
    cache = TimedLive(config, tiers, cost=cost)
    try:
        for number, prompt in enumerate(made):
            cache.serve(number, prompt)
        return cache.hits
    finally:
        cache.scheduler.close()


def simulated(made: Sequence[Prompt], config: CacheConfig, tiers: Tiers, cost: CostModel) -> list[dict[str, int]]:
    builder = TraceBuilder("made", "test", CHUNK_TOKENS)
    for number, prompt in enumerate(made):
        length = len(prompt.chunks) * CHUNK_TOKENS + prompt.rest
        builder.add(number + 1, prompt.chunks, prompt.at, length, 0, tenant=f"tenant {prompt.tenant}")
    fleet = Fleet(shared_chunks=tiers.shared, cost=cost)
    result = full_replay.replay_fleet(builder.finish(), config, CHUNK_BYTES, fleet)
    names = {SHARED: SHARED_LIVE}
    return [
        {names.get(tier, tier): int(tokens[number]) for tier, tokens in result.hit_tokens.items() if tokens[number]}
        for number in range(len(made))
    ]


def cost_model(disk: float, shared: float, latency: float, host: float = 1e8) -> CostModel:
    """A millisecond a token, so a chunk takes as long to compute as at 2.5 MB/s. The rest: bytes per second, seconds."""
    rates = {"host": (host, 0.0), "disk": (disk, latency), SHARED: (shared, latency)}
    tiers = {name: TierCost(name, rate, wait) for name, (rate, wait) in rates.items()}
    return CostModel(Prefill(0.001, 0.001, 1e-7), CHUNK_BYTES // CHUNK_TOKENS, tiers)


@st.composite
def costs(draw: st.DrawFn) -> CostModel:
    rates = st.sampled_from([3e5, 2.2e6, 4e6, 5e7])
    host = draw(st.sampled_from([1e8, 1e8, 1e6]))
    return cost_model(draw(rates), draw(rates), draw(st.sampled_from([0.0, 0.003, 0.1])), host)


def apart(made: Sequence[Prompt]) -> list[Prompt]:
    return [
        Prompt(number * APART, prompt.tenant, (*prompt.chunks, *range(first, first + FRESH)), prompt.rest)
        for number, prompt in enumerate(made)
        for first in [100_000 + number * FRESH]
    ]


@settings(max_examples=200, deadline=None)
@given(
    made=prompts(),
    host=st.integers(1, 9),
    disk=st.integers(0, 12),
    shared=st.sampled_from([0, 0, 3, 20]),
    write=st.sampled_from(["through", "back"]),
    load_deadline=st.sampled_from([0.02, 5.0]),
    cost=costs(),
)
def test_replay_and_live_scheduler_choose_alike(
    made: list[Prompt], host: int, disk: int, shared: int, write: str, load_deadline: float, cost: CostModel
) -> None:
    tiers = Tiers(host, disk, shared)
    config = configured(tiers, {"load": "auto", "write": write, "load_deadline": load_deadline})
    made = apart(made)
    assert simulated(made, config, tiers, cost) == live(made, config, tiers, cost)


def test_both_compute_at_once_when_the_first_chunk_of_a_hit_is_gone() -> None:
    """Later prompts put the first one's chunks out of the shared tier, and who counts on them learns of it by reading."""
    asked = [(1, (0, 1)), (0, (2,)), (0, (3,)), (1, (0, 1)), (1, (0, 1))]
    made = apart([Prompt(0.0, tenant, chunks, 0) for tenant, chunks in asked])
    tiers = Tiers(host=2, disk=0, shared=3)
    config = configured(tiers, {"load": "auto"})
    cost = cost_model(3e5, 3e5, 0.0)
    assert simulated(made, config, tiers, cost) == live(made, config, tiers, cost)


def test_a_slow_disk_is_left_alone_by_both() -> None:
    """Two long prompts take turns; the host holds one of them."""
    long = [tuple(range(start, start + 8)) for start in (100, 200)]
    made = apart([Prompt(0.0, 0, long[number % 2], 1) for number in range(8)])
    tiers = Tiers(host=12, disk=90)
    config = configured(tiers, {"load": "auto"})
    for disk, expected in (
        (5e7, [{}, {}, *[{"disk": 8 * CHUNK_TOKENS}] * 6]),
        (1e6, [{}, {}, {"disk": 32}, *[{}] * 5]),
    ):
        cost = cost_model(disk, disk, 0.0)
        assert simulated(made, config, tiers, cost) == expected
        assert live(made, config, tiers, cost) == expected
