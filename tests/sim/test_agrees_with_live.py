"""`lmc sim replay` and the live scheduler make the same decisions: the same requests through both, with workers that finish at once.

Live, the workers are this file's: they stand for real ones that take no time, which do not exist. All decisions are the live scheduler's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.config import CacheConfig
from lmc.cache.keys import ChunkKey, Namespace
from lmc.cache.parts import Group, Step, parts_of
from lmc.cache.plan import ABSENT, CopyReading, Plan, Report, Ticket, WorkerReady
from lmc.cache.policy import POLICIES
from lmc.cache.scheduler.cache import CacheScheduler, Identity
from lmc.cache.tiers.breaker import Breaker
from lmc.cache.tiers.format import stored_bytes
from lmc.sim import full_replay
from lmc.sim.build import TraceBuilder
from lmc.sim.compression import Codec
from lmc.sim.full_replay import Fleet
from lmc.sim.shared_store import SHARED, SharedStore

CHUNK_TOKENS = 4
CHUNK_BYTES = 10_000
SHARED_LIVE = "redis"  # the simulator's shared tier has this name in the live cache
WINDOWS = (Group("full", CHUNK_TOKENS), Group("window", CHUNK_TOKENS, 6), Group("window", CHUNK_TOKENS, 3))
PART_BYTES = (CHUNK_BYTES, 5_000, 2_500)


@dataclass(frozen=True)
class Prompt:
    at: float
    tenant: int
    chunks: tuple[int, ...]  # a number stands for a chunk and all chunks before it
    rest: int  # tokens behind the last full chunk
    request_class: str = ""


@dataclass(frozen=True)
class Tiers:
    host: int  # chunks
    disk: int = 0
    shared: int = 0
    saved: int = 0  # bytes of each chunk on disk, by compression
    groups: tuple[Group, ...] = ()  # of a model with several


@st.composite
def prompts(draw: st.DrawFn) -> list[Prompt]:
    """Prompts of two tenants that start anew or continue an earlier one of their tenant from any depth."""
    made: list[Prompt] = []
    now = 0.0
    fresh = 0
    for _ in range(draw(st.integers(1, 14))):
        tenant = draw(st.integers(0, 1))
        earlier = [prompt.chunks for prompt in made if prompt.tenant == tenant]
        prefix: tuple[int, ...] = ()
        if earlier and draw(st.integers(0, 3)):
            source = draw(st.sampled_from(earlier))
            prefix = source[: draw(st.integers(0, len(source)))]
        length = draw(st.integers(0 if prefix else 1, 5))
        now += draw(st.sampled_from([0.0, 1.0, 2.5]))
        chunks, told = (*prefix, *range(fresh, fresh + length)), draw(st.sampled_from(["", "", "user", "tool"]))
        made.append(Prompt(now, tenant, chunks, draw(st.integers(0, 2)), told))
        fresh += length
    return made


@st.composite
def configurations(draw: st.DrawFn) -> tuple[Tiers, dict[str, object]]:
    """Settings of the cache. A full write queue is left out: what it drops depends on the time that writes take."""
    tiers = Tiers(draw(st.integers(1, 9)), draw(st.integers(0, 12)), draw(st.sampled_from([0, 0, 3, 20])))
    if draw(st.booleans()):
        tiers = replace(tiers, saved=draw(st.integers(0, CHUNK_BYTES)))
    return tiers, {
        "policy": draw(st.sampled_from(sorted(POLICIES))),
        "write": draw(st.sampled_from(["through", "back", "around"])),
        "write_touches": draw(st.integers(1, 2)),
        "ttl": draw(st.sampled_from([None, None, 2.0])),
        "ttl_mode": draw(st.sampled_from(["sliding", "fixed"])),
        "tenant_quota": draw(st.sampled_from([None, 2 * CHUNK_BYTES, "100%"])),
        "min_load_tokens": draw(st.sampled_from([1, CHUNK_TOKENS + 1])),
        "load_deadline": draw(st.sampled_from([0.0, 5.0])),
    }


def configured(tiers: Tiers, more: dict[str, object]) -> CacheConfig:
    disk = {"disk": {"path": "/nowhere", "capacity": tiers.disk * stored_bytes(CHUNK_BYTES)}} if tiers.disk else {}
    if tiers.disk and tiers.saved:
        disk["disk"]["compress"] = "lossless"
    common = {"host": {"capacity": tiers.host * CHUNK_BYTES}, "metrics": {"enabled": False}}
    return CacheConfig.model_validate({**common, **disk, "lookup_deadline": 60.0, **more})


@dataclass
class SharedTier:
    """A tier of the live cache over the simulator's store of a shared tier."""

    store: SharedStore
    name: str = SHARED_LIVE

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [key in self.store for key in keys]

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class Live:
    """The live scheduler, with one worker whose copies end at once."""

    config: CacheConfig
    tiers: Tiers
    now: float = 0.0
    hits: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = SharedStore(self.tiers.shared)
        shared = {SHARED_LIVE: Breaker(SharedTier(self.store), now=lambda: 0.0)} if self.tiers.shared else {}
        ready = WorkerReady(
            Namespace("test", "model", "", "u8", "layout", CHUNK_TOKENS),
            rank=0,
            chunk_bytes=CHUNK_BYTES,
            host_slots=self.tiers.host,
            stored={"disk": {}} if self.tiers.disk else {},
            copying=CopyReading({}, {}, 1, 0, ""),
            remote=tuple(shared),
            part_bytes=PART_BYTES if self.tiers.groups else (),
        )
        with mock.patch("lmc.cache.scheduler.open.open_tiers", lambda config, scope: (shared, [])):
            self.scheduler = CacheScheduler(
                self.config, [ready], CHUNK_TOKENS, clock=lambda: self.now, groups=self.tiers.groups
            )

    def serve(self, number: int, prompt: Prompt) -> None:
        scheduler, name, self.now = self.scheduler, f"r{number}", prompt.at
        tokens = [chunk for chunk in prompt.chunks for _ in range(CHUNK_TOKENS)] + [0] * prompt.rest
        until = time.monotonic() + 120
        identity = Identity(tenant=f"tenant {prompt.tenant}", request_class=prompt.request_class)
        while (gain := scheduler.lookup(name, tokens, 0, identity)) is None:
            self._step()
            assert time.monotonic() < until, "the lookup never ended"
        blocks = range(len(prompt.chunks))
        others = [blocks] * max(len(self.tiers.groups) - 1, 0)
        scheduler.admit(name, gain, blocks, others)
        self.hits.append({tier: tokens for tier, tokens in scheduler.loaded_from(name).items() if tokens})
        self._settle()
        scheduler.store(name, tokens, len(tokens), len(tokens), blocks, others, Step(gain))
        scheduler.finish(name)
        self._settle()
        scheduler.directory.check()

    def _settle(self) -> None:
        while self.scheduler.busy:
            self._step()

    def _step(self) -> None:
        plan = self.scheduler.take_plan()
        report = Report()
        written = {copy.ticket.operation for copy in plan.tier_copies if copy.ticket[1:4:2] == ("write", "disk")}
        for operation, failure in self._carry_out(plan):
            report.finished[operation] = 1
            if operation in written:
                report.saved[operation] = self.tiers.saved
            if failure is not None:
                report.failed[operation] = failure
        self.scheduler.apply(report)

    def _carry_out(self, plan: Plan) -> Iterator[tuple[int, str | None]]:
        """In the replay's order: deletions, copies up from lower tiers, copies of blocks, copies down to lower tiers."""
        tickets = [copy.ticket for copy in plan.tier_copies]
        for kind in ("delete", "stage"):
            yield from ((ticket.operation, self._copy(ticket)) for ticket in tickets if ticket.kind == kind)
        for request in (*plan.loads, *plan.background_loads, *plan.stores):
            yield from ((chunk.operation, None) for chunk in request.chunks)
        yield from ((ticket.operation, self._copy(ticket)) for ticket in tickets if ticket.kind == "write")

    def _copy(self, ticket: Ticket) -> str | None:
        if ticket.tier == SHARED_LIVE:
            if ticket.kind == "write":
                self.store.put(ticket.key)
            elif ticket.kind == "stage" and not self.store.get(ticket.key):
                return ABSENT
        return None

    def counts(self) -> Counter[str]:
        counts = self.scheduler.directory.counts
        found = Counter({f"evicted from {tier}": number for tier, number in counts.evicted.items()})
        return found + Counter({"stores dropped": counts.stores_dropped, "writes dropped": counts.writes_dropped})


def live(made: Sequence[Prompt], config: CacheConfig, tiers: Tiers) -> tuple[list[dict[str, int]], Counter[str]]:
    cache = Live(config, tiers)
    try:
        for number, prompt in enumerate(made):
            cache.serve(number, prompt)
        return cache.hits, cache.counts()
    finally:
        cache.scheduler.close()


def simulated(made: Sequence[Prompt], config: CacheConfig, tiers: Tiers) -> tuple[list[dict[str, int]], Counter[str]]:
    builder = TraceBuilder("made", "test", CHUNK_TOKENS)
    for number, prompt in enumerate(made):
        length = len(prompt.chunks) * CHUNK_TOKENS + prompt.rest
        tenant, told = f"tenant {prompt.tenant}", prompt.request_class
        builder.add(number + 1, prompt.chunks, prompt.at, length, 0, tenant=tenant, request_class=told)
    codec = Codec(1 - tiers.saved / CHUNK_BYTES)
    fleet = Fleet(shared_chunks=tiers.shared, codec=codec)
    if tiers.groups:
        parts = parts_of(tiers.groups, CHUNK_TOKENS, PART_BYTES, config.checkpoint_tokens)
        fleet = replace(fleet, parts=parts, part_bytes=PART_BYTES)
    result = full_replay.replay_fleet(builder.finish(), config, CHUNK_BYTES, fleet)
    names = {SHARED: SHARED_LIVE}
    hits = [
        {names.get(tier, tier): int(tokens[number]) for tier, tokens in result.hit_tokens.items() if tokens[number]}
        for number in range(len(made))
    ]
    counts = Counter({name: number for name, number in result.counts.items() if name != "late"})
    return hits, +counts


@settings(max_examples=400, deadline=None)
@given(prompts(), configurations())
def test_replay_and_live_scheduler_hit_and_evict_alike(
    made: list[Prompt], configuration: tuple[Tiers, dict[str, object]]
) -> None:
    tiers, more = configuration
    config = configured(tiers, more)
    assert simulated(made, config, tiers) == live(made, config, tiers)


@settings(max_examples=200, deadline=None)
@given(prompts(), configurations(), st.sampled_from([None, CHUNK_TOKENS, 3 * CHUNK_TOKENS]))
def test_they_agree_on_models_with_windows(
    made: list[Prompt], configuration: tuple[Tiers, dict[str, object]], interval: int | None
) -> None:
    tiers, more = configuration
    tiers = replace(tiers, host=3 * tiers.host, disk=3 * tiers.disk, saved=0, groups=WINDOWS)
    config = configured(tiers, more | {"checkpoint_tokens": interval})
    assert simulated(made, config, tiers) == live(made, config, tiers)


def test_the_second_prompt_of_a_shared_prefix_hits_up_to_its_checkpoint() -> None:
    made = [Prompt(0.0, 0, (0, 1, 2, 3), 1), Prompt(1.0, 0, (0, 1, 2, 9), 1), Prompt(2.0, 0, (0, 1, 2, 8), 1)]
    tiers = Tiers(host=99, groups=WINDOWS)
    config = configured(tiers, {"checkpoint_tokens": 2 * CHUNK_TOKENS})
    hits, _ = simulated(made, config, tiers)
    assert hits == [{}, {"host": 2 * CHUNK_TOKENS}, {"host": 3 * CHUNK_TOKENS}]
    assert (hits, _) == live(made, config, tiers)


def test_a_tenant_at_its_quota_makes_room_for_staged_chunks_itself() -> None:
    """What one tenant brings up from the disk never pushes out the other's chunks; the replay once ignored the quota there."""
    long = tuple(range(100, 108))
    made = [
        Prompt(0.0, 0, tuple(range(4)), 1),
        Prompt(1.0, 1, long, 1),
        Prompt(2.0, 1, (200, 201, 202, 203), 1),
        Prompt(3.0, 1, long, 1),  # staged from the disk, as far as the quota goes
        Prompt(4.0, 0, tuple(range(4)), 1),
    ]
    tiers = Tiers(host=8, disk=40)
    config = configured(tiers, {"tenant_quota": 4 * CHUNK_BYTES})
    hits, _ = simulated(made, config, tiers)
    assert hits[4] == {"host": 4 * CHUNK_TOKENS}
    assert (hits, _) == live(made, config, tiers)


@pytest.mark.parametrize("deadline", [0.0, 5.0])
def test_a_request_that_may_not_wait_loads_what_is_there(deadline: float) -> None:
    made = [Prompt(0.0, 0, (1, 2), 1), Prompt(1.0, 0, (3, 4), 1), Prompt(2.0, 0, (1, 2), 1), Prompt(3.0, 0, (1, 2), 1)]
    tiers = Tiers(host=2, disk=9)
    config = configured(tiers, {"load_deadline": deadline})
    hits, _ = simulated(made, config, tiers)
    assert hits[2] == ({} if deadline == 0 else {"disk": 2 * CHUNK_TOKENS})
    assert (hits, _) == live(made, config, tiers)


def test_an_expired_chunk_goes_as_soon_as_nothing_continues_it_any_more() -> None:
    """Its child is evicted by a store; the replay once looked for expired chunks only when a request arrived."""
    single = [Prompt(0.0, 0, (0,), 0), Prompt(0.0, 1, (1,), 0), Prompt(0.0, 0, (2,), 0)]
    later = [Prompt(2.0, 0, (4,), 0), *(Prompt(3.0, 0, (chunk,), 0) for chunk in (5, 6, 7, 8))]
    made = [*single, Prompt(1.0, 0, (0, 3), 0), *later]
    tiers = Tiers(host=3, disk=1)
    config = configured(tiers, {"policy": "2q", "write": "through", "ttl": 2.0, "ttl_mode": "fixed"})
    assert simulated(made, config, tiers) == live(made, config, tiers)


def test_a_step_follows_all_copies_that_end_at_one_time() -> None:
    """The live scheduler learns of them in one report; the replay once removed expired chunks between the first and the second."""
    first = [Prompt(0.0, 0, (0,), 0), Prompt(0.0, 1, (1,), 0), Prompt(0.0, 0, (2, 3, 4), 0), Prompt(0.0, 0, (5,), 0)]
    later = [Prompt(2.0, 0, (8, 9), 0), Prompt(3.0, 0, (10, 11), 0), Prompt(3.0, 0, (12,), 0)]
    made = [*first, Prompt(1.0, 0, (2, 3, 4, 6, 7), 0), *later]
    tiers = Tiers(host=7, disk=4)
    config = configured(tiers, {"policy": "2q", "write": "through", "ttl": 2.0, "ttl_mode": "fixed"})
    assert simulated(made, config, tiers) == live(made, config, tiers)


def test_the_policy_learns_from_classes_as_in_the_replay() -> None:
    """More classes than the policy is told apart, and chats of every second class that return."""
    made: list[Prompt] = []
    for number in range(400):
        chunks = tuple(range(10 * number, 10 * number + 3))
        made.append(Prompt(float(number), 0, chunks, 1, f"class{number % 20}"))
        if number >= 9 and (number - 9) % 2:
            made.append(Prompt(float(number), 0, tuple(range(10 * (number - 9), 10 * (number - 9) + 3)), 1))
    tiers = Tiers(host=20)
    config = configured(tiers, {"policy": "predictive"})
    told = simulated(made, config, tiers)
    assert told == live(made, config, tiers)
    assert told != simulated([replace(prompt, request_class="") for prompt in made], config, tiers)
