"""A reset succeeds at once, whatever is in use, and nothing of before it is loaded or stored after it."""

from __future__ import annotations

import random
import threading

import pytest

from lmc.cache.tiers.disk import DiskTier
from tests.cache.instance import CHUNK_BYTES, NOBODY, Clock, chunk_files, prompt, start


def test_a_pin_does_not_survive_it(instances):
    instance = start(instances, clock=Clock())
    scheduler, tokens = instance.scheduler, prompt(1, 50)
    scheduler.lookup("r", tokens, 0, NOBODY)
    instance.serve(tokens)
    scheduler.lookup("pinned", tokens, 0, NOBODY)
    scheduler.finish("pinned", pin_seconds=float("inf"))
    scheduler.reset()
    assert (scheduler.directory.num_pins, scheduler.directory.usage()["host"][0]) == (0, 0)
    assert instance.serve(tokens).loaded == 0


def test_a_prompt_that_is_being_computed_is_not_stored_any_more(instances, tmp_path):
    """Its first part was computed by the weights of before, and its names are theirs."""
    instance = start(instances, disk_path=tmp_path)
    scheduler, tokens = instance.scheduler, prompt(1, 50)
    assert scheduler.lookup("r", tokens, 0, NOBODY) == 0
    scheduler.admit("r", 0, list(range(13)))
    scheduler.reset()
    assert not scheduler.wants_store("r", 50, 50)
    scheduler.store("r", tokens, 50, 50, list(range(13)))
    assert not scheduler.take_plan().stores
    assert scheduler.lookup("r", tokens, 0, NOBODY) == 0 and scheduler.explain("r")["miss"] == "cleared"
    scheduler.finish("r", pin_seconds=60)
    assert scheduler.directory.num_pins == 0
    instance.settle()
    assert not chunk_files(tmp_path)


def test_a_request_that_waits_for_the_disk_loads_nothing_any_more(instances, tmp_path):
    tokens = prompt(1, 50)
    start(instances, disk_path=tmp_path).serve(tokens)
    instances.pop().close()
    instance = start(instances, disk_path=tmp_path)
    assert instance.scheduler.lookup("r", tokens, 0, NOBODY) is None
    instance.scheduler.reset()
    assert instance.scheduler.lookup("r", tokens, 0, NOBODY) == 0
    instance.scheduler.admit("r", 0, [])
    instance.scheduler.finish("r")
    instance.settle()
    assert {tier: used for tier, (used, _) in instance.scheduler.directory.usage().items()} == {"host": 0, "disk": 0}
    assert not chunk_files(tmp_path)


def test_a_request_that_waits_for_an_answer_is_computed(instances, tmp_path):
    """It was asked for once, and has found nothing yet."""
    instance = start(instances, disk_path=tmp_path, disk_shared=True, lookup_deadline=60.0)
    tokens = prompt(1, 50)
    assert instance.scheduler.lookup("r", tokens, 0, NOBODY) is None
    instance.scheduler.reset()
    assert instance.scheduler.lookup("r", tokens, 0, NOBODY) == 0
    instance.scheduler.admit("r", 0, [])
    assert instance.scheduler.explain("r")["miss"] == "cleared" and not instance.scheduler.loaded_from("r")
    instance.scheduler.finish("r")


def test_what_is_in_use_is_dropped_when_it_comes_free(instances, tmp_path, monkeypatch):
    gate, put = threading.Event(), DiskTier.put

    def slow_put(self, *arguments):
        assert gate.wait(20)
        return put(self, *arguments)

    monkeypatch.setattr(DiskTier, "put", slow_put)
    instance = start(instances, disk_path=tmp_path)
    tokens = prompt(1, 50)
    instance.serve(tokens, settle=False)
    instance.pump()
    assert instance.scheduler.directory.num_open > 0
    instance.scheduler.reset()
    assert instance.serve(tokens, settle=False).loaded == 0, "the chunks of before have other names"
    gate.set()
    instance.settle()
    assert {tier: used for tier, (used, _) in instance.scheduler.directory.usage().items()} == {"host": 6, "disk": 6}
    assert len(chunk_files(tmp_path)) == 6
    assert instance.serve(tokens).loaded == 48


@pytest.mark.parametrize("seed", range(3))
def test_resets_at_any_moment_leave_nothing_behind(instances, tmp_path, seed):
    instance = start(instances, disk_path=tmp_path, host_capacity=20 * CHUNK_BYTES)
    chance = random.Random(seed)
    for number in range(60):
        tokens = prompt(chance.randrange(4), 20 + chance.randrange(40))
        if chance.random() < 0.3:
            instance.scheduler.lookup(f"asks {number}", tokens, 0, NOBODY)
            instance.scheduler.reset()
            assert instance.scheduler.lookup(f"asks {number}", tokens, 0, NOBODY) == 0
            instance.scheduler.finish(f"asks {number}")
        instance.serve(tokens, settle=chance.random() < 0.5)
    instance.scheduler.reset()
    instance.settle()
    assert {tier: used for tier, (used, _) in instance.scheduler.directory.usage().items()} == {"host": 0, "disk": 0}
    assert not chunk_files(tmp_path)
