from __future__ import annotations

import threading

import pytest

from lmc.cache.keys import ChunkKey
from lmc.cache.observe.accounting import Salts
from lmc.cache.scheduler.presence import Presence
from lmc.cache.tiers.breaker import Breaker
from lmc.errors import TierError
from tests.services import wait_until

KEYS = [ChunkKey(bytes([number] * 32)) for number in range(200)]


class Tier:
    """Stands for a server, which would answer too quickly to be asked in between. Holds the first `stored` keys."""

    name = "redis"

    def __init__(self, stored: int = 0, *, broken: bool = False) -> None:
        self.stored = stored
        self.broken = broken
        self.batches: list[int] = []
        self.closed = False
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Event()

    def contains(self, keys):
        self.asked.set()
        assert self.gate.wait(60)
        self.batches.append(len(keys))
        if self.broken:
            raise TierError("redis tier: injected")
        return [KEYS.index(key) < self.stored for key in keys]

    def close(self) -> None:
        self.closed = True


def ask(presence: Presence, keys=KEYS):
    question = presence.ask(keys)
    wait_until(lambda: question.done, "the answer", 10)
    return presence.answers()


@pytest.mark.parametrize(("stored", "batches"), [(0, [16]), (15, [16]), (16, [16, 64]), (200, [16, 64, 120])])
def test_keys_are_asked_in_growing_batches_up_to_the_first_absent_one(stored, batches):
    tier = Tier(stored)
    presence = Presence({"redis": [Breaker(tier)]})
    (answer,) = ask(presence)
    assert tier.batches == batches
    assert sum(answer.present) == min(stored, sum(batches)) and len(answer.keys) == len(answer.present)
    presence.close(10)
    assert tier.closed


def test_a_chunk_is_there_when_it_is_there_for_every_rank():
    presence = Presence({"redis": [Breaker(Tier(stored)) for stored in (10, 4, 7)]})
    (answer,) = ask(presence)
    assert sum(answer.present) == 4
    presence.close(10)


def test_each_tier_answers_for_itself():
    presence = Presence({"redis": [Breaker(Tier(broken=True))], "s3": [Breaker(Tier(5))]})
    answers = {answer.tier: answer for answer in ask(presence)}
    assert answers["redis"].failure and not answers["redis"].keys
    assert sum(answers["s3"].present) == 5 and not answers["s3"].failure
    presence.close(10)


def test_a_tier_with_too_much_to_do_is_not_asked():
    tier = Tier(5)
    tier.gate.clear()
    presence = Presence({"redis": [Breaker(tier)]})
    questions = [presence.ask(KEYS) for _ in range(70)]
    assert [question.done for question in questions] == [False] * 64 + [True] * 6
    assert [question.failed for question in questions] == [False] * 64 + [True] * 6
    tier.gate.set()
    wait_until(lambda: all(question.done for question in questions), "the answers", 10)
    assert len(presence.answers()) == 64
    assert len(ask(presence)) == 1
    presence.close(10)


def test_close_waits_no_longer_than_its_limit_for_a_tier_that_hangs():
    tier = Tier(5)
    tier.gate.clear()
    presence = Presence({"redis": [Breaker(tier)]})
    questions = [presence.ask(KEYS) for _ in range(5)]
    assert tier.asked.wait(60), "a thread uses the connection"
    presence.close(0.1)
    assert not tier.closed, "its connection is in use"
    assert not any(question.done for question in questions)
    tier.gate.set()


def test_a_tier_that_hangs_is_asked_no_more_and_answers_for_what_waits():
    tier, now = Tier(5), 0.0
    tier.gate.clear()
    presence = Presence({"redis": [Breaker(tier, patience=5.0, now=lambda: now)]})
    first = [presence.ask(KEYS) for _ in range(6)]
    wait_until(
        lambda: presence._threads["redis"].num_jobs == 6 and len(presence._threads["redis"].running()) == 2, "calls"
    )
    now = 6.0
    late = presence.ask(KEYS)
    assert late.done and late.failed
    assert [question.done for question in first] == [False, False, True, True, True, True]
    assert {answer.failure for answer in presence.answers()} == {"unavailable"}
    tier.gate.set()
    wait_until(lambda: all(question.done for question in first), "the answers after all", 10)
    now = 60.0
    (answer,) = ask(presence)[-1:]
    assert sum(answer.present) == 5, "the trial call went well"
    presence.close(10)


def test_what_could_not_be_asked_is_not_known(caplog):
    tier = Tier(broken=True)
    presence = Presence({"redis": [Breaker(tier)], "s3": [Breaker(Tier(5))]})
    question = presence.ask(KEYS)
    wait_until(lambda: question.done, "the answer", 10)
    assert question.failed
    assert {answer.tier: answer.failure for answer in presence.answers()} == {"redis": "error", "s3": ""}
    assert [record.getMessage() for record in caplog.records] == ["lmc: redis tier: injected"]
    tier.broken = False
    question = presence.ask(KEYS)
    wait_until(lambda: question.done, "the answer", 10)
    assert not question.failed
    presence.close(10)


def test_a_prompt_of_another_tenant_is_noticed():
    salts = Salts(4)
    assert not salts.seen_elsewhere([1, 2, 3, 4, 5], b"a")
    assert not salts.seen_elsewhere([1, 2, 3, 4, 9], b"a")
    assert salts.seen_elsewhere([1, 2, 3, 4], b"b")
    assert not salts.seen_elsewhere([1, 2, 3, 5], b"b")
