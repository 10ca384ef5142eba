"""What is loaded and what is computed, by estimates learned from given times; and a tier that turns slow, on a clock of the test's."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from lmc.cache.config import CacheConfig
from lmc.cache.directory import HOST, Capacity, Miss, Request, Ticket, build_directory
from lmc.cache.directory.choice import choose
from lmc.cache.directory.prefill import PrefillTimes
from lmc.cache.directory.speeds import RETRY_SECONDS, Link, Speeds
from lmc.cache.keys import ChunkKey

CHUNK = 16
DISK, REDIS = "disk", "redis"


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(32, "big"))


def tickets(tier: str, numbers: range) -> list[Ticket]:
    return [Ticket(number, "stage", key(number), tier, 0) for number in numbers]


def stage(speeds: Speeds, tier: str, chunks: int, seconds: float, now: float = 0.0) -> None:
    asked = tickets(tier, range(chunks))
    speeds.staging(asked, now)
    for ticket in asked:
        speeds.staged(ticket.operation, now + seconds, None, failed=False)


# Estimates


@given(st.floats(0.05, 20.0), st.floats(1e-5, 1.0), st.lists(st.integers(1, 200), max_size=60))
def test_measurements_of_several_sizes_tell_latency_and_bandwidth_apart(
    latency_chunks: float, each: float, sizes: list[int]
) -> None:
    latency = latency_chunks * each
    link = Link()
    for size in [*sizes, *(1, 200) * 20]:
        link.learn(size, latency + size * each)
    for size in (1, 200):
        assert link.seconds(size) == approx(latency + size * each, rel=0.3)


@given(st.integers(1, 100), st.floats(1e-4, 1.0), st.floats(1.0, 500.0))
def test_what_turns_slow_or_quick_is_known_within_five_measurements(size: int, before: float, factor: float) -> None:
    for first, then in ((before, before * factor), (before * factor, before)):
        link = Link()
        for seconds in [first] * 20 + [then] * 5:
            link.learn(size, seconds)
        expected = link.seconds(size)
        assert expected is not None
        assert max(expected / then, then / expected) < factor**0.5 + 1e-6


@given(
    st.floats(0.0, 1_000.0),
    st.floats(1e-5, 1e-2),
    st.floats(0.0, 1e-6),
    st.lists(st.tuples(st.integers(0, 50_000), st.integers(1, 8_000)), max_size=20),
)
def test_passes_of_several_sizes_give_the_seconds_of_any_prompt(
    call_tokens: float, token: float, pair: float, more: list[tuple[int, int]]
) -> None:
    call = call_tokens * token

    def takes(at: int, new: int) -> float:
        return call + token * new + pair * new * (at + new / 2)

    times = PrefillTimes()
    for at, new in [(0, 8_000), (0, 100), (8_000, 8_000), (40_000, 8_000), (40_000, 10), *more]:
        for _ in range(3):
            times.learn([(at, new)], takes(at, new))
    for at, new in ((0, 4_000), (2_000, 8_000), (30_000, 7_000)):
        assert times.seconds(at, new) == approx(takes(at, new), rel=0.1)


def test_one_measured_pass_is_enough_for_a_guess_and_small_passes_do_not_push_it_out() -> None:
    times = PrefillTimes()
    times.learn([(0, 3)], 0.1)
    assert times.seconds(0, 1_000) is None
    times.learn([(0, 1_000)], 1.0)
    assert times.seconds(0, 1_000) == approx(1.0)
    assert times.seconds(0, 500) == approx(0.5, rel=0.1)
    assert times.seconds(0, 4_000) == approx(4.3, rel=0.1)
    for _ in range(1_000):
        times.learn([(1_000, 20), (3_000, 1)], 0.05)
    assert times.seconds(0, 1_000) == approx(1.0, rel=0.05)


def test_nothing_is_expected_of_what_was_not_measured() -> None:
    speeds = Speeds()
    assert speeds.computing(0, 100) is None
    assert speeds.loading(DISK, 5, 0.0) == 0.0
    stage(speeds, DISK, 4, 0.0)  # a clock that does not show a difference measures nothing
    assert speeds.loading(DISK, 5, 0.0) == 0.0


def test_a_tier_that_has_not_answered_yet_is_as_slow_as_its_oldest_request() -> None:
    speeds = Speeds()
    speeds.staging(tickets(DISK, range(3)), 10.0)
    assert speeds.loading(DISK, 1, 17.0) == 7.0
    speeds.staged(0, 17.0, None, failed=False)
    speeds.staged(1, 17.0, None, failed=True)
    speeds.staged(2, 17.0, None, failed=True)  # given up, and nothing is known yet
    assert speeds.loading(DISK, 1, 18.0) == 0.0


def test_a_failure_that_took_longer_than_expected_shows_a_slow_tier_and_a_quick_one_nothing() -> None:
    speeds = Speeds()
    stage(speeds, DISK, 4, 1.0)
    before = speeds.loading(DISK, 4, 0.0)
    for seconds, slower in ((0.01, False), (50.0, True)):
        asked = tickets(DISK, range(4))
        speeds.staging(asked, 0.0)
        for ticket in asked:
            speeds.staged(ticket.operation, seconds, None, failed=True)
        assert (speeds.loading(DISK, 4, 0.0) > before) == slower


def test_the_time_of_a_copy_counts_and_not_when_it_was_reported() -> None:
    speeds = Speeds()
    speeds.staging(tickets(DISK, range(3)), 0.0)
    for number, seconds in enumerate((0.1, 0.3, 0.2)):
        speeds.staged(number, 5.0, seconds, failed=False)
    assert speeds.loading(DISK, 3, 5.0) == approx(0.3)


def test_chunks_under_way_are_a_queue() -> None:
    speeds = Speeds()
    for chunks in (1, 50) * 20:
        stage(speeds, DISK, chunks, 0.1 + chunks * 0.01)
    alone = speeds.loading(DISK, 10, 0.0)
    speeds.staging(tickets(DISK, range(100, 140)), 0.0)
    assert speeds.loading(DISK, 10, 0.0) == approx(alone + 40 * 0.01, rel=0.1)


# The choice


@dataclass
class Known:
    """Speeds that were measured well."""

    each: dict[str, float]  # seconds of a chunk
    token: float
    pair: float
    speeds: Speeds = field(default_factory=Speeds)

    def __post_init__(self) -> None:
        for tier, seconds in self.each.items():
            for _ in range(200):
                self.speeds._link(tier).learn(1, seconds * 1.1)
                self.speeds._link(tier).learn(1_000, seconds * 1_000.1)
        for at, new in ((0, 1_000), (0, 100), (1_000, 1_000), (1_000, 1)):
            seconds = self.token * 3 + self.token * new + self.pair * new * (at + new / 2)
            self.speeds.computed([(at, new)], seconds)

    def expected(self, tiers: list[str], first: int, end: int, computed: int, num_tokens: int) -> float:
        """Added up chunk by chunk."""
        position = max(end * CHUNK, computed) if end > first else computed
        seconds = self.speeds.computing(position, num_tokens - position)
        assert seconds is not None
        loaded = tiers[first:end]
        waits = [self.speeds.loading(tier, loaded.count(tier), 0.0) for tier in set(loaded) if tier != HOST]
        host = self.speeds.loading(HOST, end - first, 0.0)
        return max(waits, default=0.0) + host + seconds


RATES = st.floats(1e-4, 1.0)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([HOST, HOST, DISK, REDIS]), max_size=12),
    st.tuples(RATES, RATES, RATES),
    st.floats(1e-5, 0.1),
    st.floats(0.0, 1e-4),
    st.integers(0, 100),
    st.integers(1, 60),
)
def test_nothing_else_at_the_ends_of_runs_is_expected_to_be_quicker(
    tiers: list[str], rates: tuple[float, float, float], token: float, pair: float, computed: int, rest: int
) -> None:
    known = Known(dict(zip((HOST, DISK, REDIS), rates, strict=True)), token, pair)
    num_tokens = max(len(tiers) * CHUNK, computed) + rest
    first = min(computed // CHUNK, len(tiers))
    choice = choose(tuple(tiers), computed, num_tokens, CHUNK, known.speeds, 0.0)
    ends = [end for end in range(first, len(tiers) + 1) if end in (first, len(tiers)) or tiers[end - 1] != tiers[end]]
    assert choice.load_end in ends
    expected = {end: known.expected(tiers, first, end, computed, num_tokens) for end in ends}
    assert expected[choice.load_end] <= min(expected.values()) * (1 + 1e-9)
    assert choice.load_end <= choice.try_end <= len(tiers)


def test_the_quick_front_is_loaded_and_the_slow_rest_computed() -> None:
    known = Known({HOST: 1e-4, DISK: 1.0}, token=0.01, pair=0.0)
    tiers = (HOST,) * 5 + (DISK,) * 20
    choice = choose(tiers, 0, 25 * CHUNK + 1, CHUNK, known.speeds, 0.0)
    assert (choice.load_end, choice.try_end) == (5, 13)
    known.speeds.staging(tickets(DISK, range(1)), 0.0)
    assert choose(tiers, 0, 25 * CHUNK + 1, CHUNK, known.speeds, RETRY_SECONDS - 1) == (5, 5)
    assert choose(tiers, 0, 25 * CHUNK + 1, CHUNK, known.speeds, RETRY_SECONDS) == (5, 13)


def test_host_hits_are_loaded_unless_that_is_measured_to_be_slower() -> None:
    for each, loaded in ((0.1, 8), (0.2, 0)):
        known = Known({HOST: each}, token=0.01, pair=0.0)
        assert choose((HOST,) * 8, 0, 8 * CHUNK + 1, CHUNK, known.speeds, 0.0).load_end == loaded


# A tier that turns slow


class Engine:
    """Requests, one after the other, over a real directory; a chunk takes disk_s to read, and a token token_s to compute.

    What is staged while a request is computed is over in the end of its pass, as it is in an engine.
    """

    def __init__(self, load: str) -> None:
        self.config = CacheConfig.model_validate({"load": load, "load_deadline": 60.0})
        self.directory = build_directory(self.config, 8, 1, below={DISK: Capacity(1000, 1, 1000)}, remote=())
        self.now = 0.0
        self.disk_s = 0.001
        self.token_s = 0.001
        self.number = 0
        self.staged_unasked = 0

    def serve(self, prompt: range) -> tuple[int, str | None, float]:
        """Tokens loaded, why no more, and the seconds to the first token."""
        directory, arrived = self.directory, self.now
        keys = [key(number) for number in prompt]
        self.number += 1
        request = Request(str(self.number), directory, self.config, CHUNK, "", self.now)
        num_tokens = len(keys) * CHUNK + 1
        gain = request.lookup(keys, num_tokens, 0, self.now)
        staged = request.take_tickets()
        if gain is None:
            self._end(staged, self.disk_s)
            gain = request.lookup(keys, num_tokens, 0, self.now)
            staged = []
        assert gain is not None
        loads = request.load(gain)
        for _, load in loads:
            directory.complete(load.operation, None, self.now)
            request.loaded(load.operation, None)
        if gain:
            directory.speeds.loaded(gain / CHUNK, 1e-5 * gain / CHUNK)
        seconds = (num_tokens - gain) * self.token_s
        self.now += seconds
        directory.speeds.computed([(gain, num_tokens - gain)], seconds)
        ttft = self.now - arrived
        self.staged_unasked += len(staged)
        for index, ticket in enumerate(staged):
            directory.complete(ticket.operation, None, self.now, 0, (index + 1) * self.disk_s)
        stores = request.store(keys, num_tokens, num_tokens, self.now)
        miss = request.miss()
        request.end()
        self._end([store for _, store in stores], 0.0)
        self._end(directory.take_tickets(), 0.0)
        directory.check()
        self.now += 1.0
        return gain, miss, ttft

    def _end(self, tickets: list[Ticket], each: float) -> None:
        for ticket in tickets:
            self.now += each
            self.directory.complete(ticket.operation, None, self.now)


PROMPTS = [range(start, start + 8) for start in (0, 100)]
WHOLE = 8 * CHUNK


def served(engine: Engine, count: int) -> list[tuple[int, str | None, float]]:
    return [engine.serve(PROMPTS[engine.number % 2]) for _ in range(count)]


def test_a_disk_that_turns_slow_is_left_alone_within_five_requests_and_comes_back() -> None:
    engine = Engine("auto")
    assert [gain for gain, *_ in served(engine, 2)] == [0, 0]
    assert [gain for gain, *_ in served(engine, 20)] == [WHOLE] * 20
    engine.disk_s = 1.0
    slow = served(engine, 40)
    assert [gain for gain, *_ in slow[5:]] == [0] * 35
    assert {miss for _, miss, _ in slow[5:]} == {Miss.SLOWER}
    cold = (WHOLE + 1) * engine.token_s
    assert max(ttft for *_, ttft in slow[5:]) == approx(cold)  # what is tried, nobody waits for
    assert engine.staged_unasked > 0
    engine.disk_s = 0.001
    again = served(engine, 120)
    assert [gain for gain, *_ in again[-10:]] == [WHOLE] * 10


def test_always_means_always() -> None:
    engine = Engine("always")
    engine.disk_s = 1.0
    assert [gain for gain, *_ in served(engine, 12)] == [0, 0] + [WHOLE] * 10


def test_auto_is_about_as_quick_as_the_quicker_of_the_two() -> None:
    def median(load: str, disk_s: float) -> float:
        engine = Engine(load)
        engine.disk_s = disk_s
        times = sorted(ttft for *_, ttft in served(engine, 41))
        return times[20]

    for disk_s in (0.0001, 0.005, 0.014, 0.018, 0.1, 5.0):
        auto, always = median("auto", disk_s), median("always", disk_s)
        cold = (WHOLE + 1) * 0.001
        assert auto <= min(always, cold) * 1.05
