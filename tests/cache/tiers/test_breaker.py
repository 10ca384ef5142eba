from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.breaker import SLOWEST, Breaker, TierOpen
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.stored import Moved
from lmc.errors import ConfigError, Corrupt, TierError, TierFull
from tests.contracts.tier import OpenTier, TierContract, key, payload

SLOT = memoryview(bytearray(8))


class TestClosedBreaker(TierContract):
    """A tier behind a breaker is still a tier; Redis and S3 always are behind one."""

    model_examples = 5

    @pytest.fixture
    def open_tier(self, tmp_path: Path) -> OpenTier:
        return lambda scope: Breaker(DiskTier(tmp_path, scope))


class ScriptedTier:
    """Answers as it is told."""

    name = "scripted"

    def __init__(self) -> None:
        self.answer: BaseException | None = None
        self.calls = 0
        self.closed = False

    def put(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> Moved:
        self._reply()
        return Moved(len(data))

    def get(self, key: ChunkKey, out: memoryview) -> Moved:
        self._reply()
        return Moved(len(out))

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        self._reply()
        return [True for _ in keys]

    def delete(self, key: ChunkKey) -> None:
        self._reply()

    def close(self) -> None:
        self.closed = True

    def _reply(self) -> None:
        self.calls += 1
        if self.answer is not None:
            raise self.answer


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def broken(threshold: int = 3) -> tuple[Breaker, ScriptedTier, Clock]:
    """A breaker that has just opened."""
    tier, clock = ScriptedTier(), Clock()
    breaker = Breaker(tier, threshold=threshold, first_wait=1.0, longest_wait=5.0, now=clock)
    tier.answer = TierError("down")
    for _ in range(threshold):
        for call in (lambda: breaker.get(key(1), SLOT), lambda: breaker.delete(key(1))):
            with pytest.raises(TierError):
                call()
    return breaker, tier, clock


@pytest.mark.parametrize(
    "call",
    [
        lambda tier: tier.put(key(1), payload(1)),
        lambda tier: tier.get(key(1), SLOT),
        lambda tier: tier.contains([key(1)]),
        lambda tier: tier.delete(key(1)),
    ],
    ids=["put", "get", "contains", "delete"],
)
def test_an_open_breaker_makes_no_call(call: Callable[[Breaker], object]) -> None:
    breaker, tier, _ = broken()
    made = tier.calls
    with pytest.raises(TierOpen, match=r"failed 3 times in a row; left alone for another 1\.0 s"):
        call(breaker)
    assert tier.calls == made
    assert breaker.counters("read").refusals + breaker.counters("write").refusals == 1


def test_answers_pass_through() -> None:
    breaker = Breaker(ScriptedTier())
    assert breaker.contains([key(1), key(2)]) == [True, True]
    assert breaker.name == "scripted"


@pytest.mark.parametrize("answer", [KeyError("absent"), TierFull("full"), Corrupt("corrupt")])
def test_an_answer_of_a_live_server_is_no_failure(answer: Exception) -> None:
    tier = ScriptedTier()
    breaker = Breaker(tier, threshold=1)
    tier.answer = answer
    for _ in range(5):
        with pytest.raises(type(answer)):
            breaker.get(key(1), SLOT)
    assert breaker.state("read") == "closed"
    assert breaker.counters("read").failures == 0
    breaker, tier, clock = broken()
    clock.seconds += 1
    tier.answer = answer
    with pytest.raises(type(answer)):
        breaker.get(key(1), SLOT)
    assert breaker.state("read") == "closed", "it ends a trial well, too"


def test_successes_in_between_keep_it_closed() -> None:
    tier = ScriptedTier()
    breaker = Breaker(tier, threshold=2)
    for _ in range(5):
        tier.answer = TierError("lost")
        with pytest.raises(TierError):
            breaker.delete(key(1))
        tier.answer = None
        breaker.delete(key(1))
    assert breaker.state("write") == "closed"
    assert (breaker.counters("write").failures, breaker.counters("write").openings) == (5, 0)


def test_the_back_off_doubles_up_to_its_limit() -> None:
    breaker, _, clock = broken()
    for wait in (1.0, 2.0, 4.0, 5.0, 5.0):
        clock.seconds += wait - 0.01
        with pytest.raises(TierOpen):
            breaker.get(key(1), SLOT)
        clock.seconds += 0.01
        with pytest.raises(TierError, match="down"):
            breaker.get(key(1), SLOT)
    assert breaker.counters("read").openings == 1


def test_a_successful_trial_closes_it_and_forgets_the_back_off() -> None:
    breaker, tier, clock = broken()
    clock.seconds += 1
    with pytest.raises(TierError, match="down"):
        breaker.get(key(1), SLOT)
    clock.seconds += 2
    tier.answer = None
    breaker.get(key(1), SLOT)
    assert breaker.state("read") == "closed"
    tier.answer = TierError("down")
    for _ in range(3):
        with pytest.raises(TierError, match="down"):
            breaker.get(key(1), SLOT)
    with pytest.raises(TierOpen, match=r"another 1\.0 s"):
        breaker.get(key(1), SLOT)


def test_only_one_call_is_the_trial() -> None:
    breaker, tier, clock = broken()
    clock.seconds += 1
    inside, go_on = threading.Event(), threading.Event()

    def slow_reply() -> None:
        inside.set()
        assert go_on.wait(60)

    tier._reply = slow_reply  # type: ignore[method-assign]
    trial = threading.Thread(target=breaker.get, args=(key(1), SLOT))
    trial.start()
    assert inside.wait(60)
    with pytest.raises(TierOpen, match="trial"):
        breaker.get(key(1), SLOT)
    go_on.set()
    trial.join()
    assert breaker.state("read") == "closed"


def test_an_interrupted_trial_is_followed_by_another() -> None:
    breaker, tier, clock = broken()
    clock.seconds += 1
    tier.answer = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        breaker.get(key(1), SLOT)
    tier.answer = None
    breaker.get(key(1), SLOT)
    assert breaker.state("read") == "closed"


def test_opening_and_closing_are_logged_once_with_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        breaker, tier, clock = broken()
        with pytest.raises(TierOpen):
            breaker.get(key(1), SLOT)
        clock.seconds += 1
        tier.answer = None
        breaker.get(key(1), SLOT)
        breaker.get(key(1), SLOT)
    assert [record.getMessage() for record in caplog.records] == [
        *["down; 3 failures in a row, so the tier is left alone for 1 s"] * 2,
        "scripted tier, reads: answers again",
    ]


def test_writes_that_fail_take_no_reads_away() -> None:
    tier = ScriptedTier()
    breaker = Breaker(tier, threshold=2)
    tier.answer = TierError("NOREPLICAS")
    for _ in range(2):
        with pytest.raises(TierError, match="NOREPLICAS"):
            breaker.put(key(1), payload(1))
    with pytest.raises(TierOpen):
        breaker.delete(key(1))
    tier.answer = None
    breaker.get(key(1), SLOT)
    assert breaker.contains([key(1)]) == [True]
    assert (breaker.state("read"), breaker.state("write")) == ("closed", "open")
    assert breaker.refuses("write") and not breaker.refuses("read")


def takes(tier: ScriptedTier, clock: Clock, seconds: float) -> None:
    def reply() -> None:
        clock.seconds += seconds

    tier._reply = reply  # type: ignore[method-assign]


def test_reads_that_are_only_slow_open_it_and_a_slow_trial_does_not_close_it(caplog: pytest.LogCaptureFixture) -> None:
    tier, clock = ScriptedTier(), Clock()
    breaker = Breaker(tier, first_wait=1.0, slow=0.5, now=clock)
    takes(tier, clock, 0.7)
    for _ in range(3):
        breaker.get(key(1), SLOT)
    with pytest.raises(TierOpen):
        breaker.get(key(1), SLOT)
    assert "a call took 0.7 s, more than 0.5 s" in caplog.text
    clock.seconds += 1
    breaker.get(key(1), SLOT)
    assert breaker.state("read") == "open"
    clock.seconds += 2
    takes(tier, clock, 0.4)
    breaker.get(key(1), SLOT)
    assert breaker.state("read") == "closed"


def test_large_chunks_may_take_longer_and_writes_any_time() -> None:
    tier, clock = ScriptedTier(), Clock()
    breaker = Breaker(tier, threshold=1, slow=0.5, now=clock)
    takes(tier, clock, 1.4)
    breaker.get(key(1), memoryview(bytearray(SLOWEST)))
    assert breaker.state("read") == "closed"
    breaker.put(key(1), SLOT)
    assert breaker.state("write") == "closed"
    breaker.get(key(1), SLOT)
    assert breaker.state("read") == "open"


def test_one_call_that_never_ends_opens_it_and_its_late_end_says_nothing() -> None:
    tier, clock = ScriptedTier(), Clock()
    breaker = Breaker(tier, first_wait=1.0, patience=5.0, now=clock)
    inside, go_on = threading.Event(), threading.Event()
    reply = tier._reply

    def hang() -> None:
        inside.set()
        assert go_on.wait(60)

    tier._reply = hang  # type: ignore[method-assign]
    stuck = threading.Thread(target=breaker.get, args=(key(1), SLOT))
    stuck.start()
    assert inside.wait(60)
    clock.seconds += 4.9
    assert not breaker.refuses("read")
    clock.seconds += 0.2
    assert breaker.refuses("read")
    assert (breaker.counters("read").failures, breaker.counters("read").openings) == (1, 1)
    go_on.set()
    stuck.join()
    assert breaker.state("read") == "open", "an answer after so long is no success"
    clock.seconds += 1
    tier._reply = reply  # type: ignore[method-assign]
    breaker.get(key(1), SLOT)
    assert breaker.state("read") == "closed"


def test_close_reaches_the_tier_also_when_open() -> None:
    breaker, tier, _ = broken()
    breaker.close()
    assert tier.closed


@pytest.mark.parametrize(
    "wrong", [{"threshold": 0}, {"first_wait": 0.0}, {"first_wait": 2.0, "longest_wait": 1.0}, {"slow": 9.0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Breaker(ScriptedTier(), **wrong)  # type: ignore[arg-type]


class BreakerMachine(RuleBasedStateMachine):
    """Against a model that knows only the history: the time of each failure since the last success."""

    @initialize(threshold=st.integers(1, 4))
    def start(self, threshold: int) -> None:
        self.tier, self.clock = ScriptedTier(), Clock()
        self.threshold = threshold
        self.breaker = Breaker(self.tier, threshold=threshold, first_wait=1.0, longest_wait=8.0, now=self.clock)
        self.failures: list[float] = []

    @rule(seconds=st.sampled_from([0.25, 1.0, 3.0, 9.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.seconds += seconds

    @rule(works=st.booleans())
    def call(self, works: bool) -> None:
        self.tier.answer = None if works else TierError("down")
        may_call = self.may_call()
        before = self.tier.calls
        try:
            self.breaker.get(key(1), SLOT)
        except TierOpen:
            assert not may_call
            assert self.tier.calls == before
        except TierError:
            assert may_call
            self.failures.append(self.clock.seconds)
        else:
            assert may_call
            self.failures.clear()

    def may_call(self) -> bool:
        extra = len(self.failures) - self.threshold
        return extra < 0 or self.clock.seconds >= self.failures[-1] + min(2.0**extra, 8.0)

    @invariant()
    def state_fits_the_history(self) -> None:
        assert self.breaker.state("read") == ("closed" if len(self.failures) < self.threshold else "open")


TestBreakerMachine = BreakerMachine.TestCase
