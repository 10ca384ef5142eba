"""Requests that end in whatever way, while tiers fail: no pin, no slot and no open operation is left behind."""

from __future__ import annotations

import random
import time

import pytest

from lmc.cache.tiers.disk import DiskTier
from lmc.errors import Corrupt, TierError
from tests.cache.instance import CHUNK_BYTES, CHUNK_TOKENS, NOBODY, Instance, prompt, settings

HOST_CHUNKS = 16


def unsteady(call, chance: random.Random):
    """A call of a tier that may be late or fail."""

    def may_fail(*arguments):
        luck = chance.random()
        if luck < 0.2:
            raise (TierError if luck < 0.1 else Corrupt)("disk tier: injected")
        if luck < 0.4:
            time.sleep(0.01)
        return call(*arguments)

    return may_fail


@pytest.mark.parametrize("write", ["through", "back"])
def test_nothing_is_left_of_a_request(instances, tmp_path, monkeypatch, write):
    few = {"host_capacity": HOST_CHUNKS * CHUNK_BYTES, "load_deadline": 0.03}
    instance = Instance(settings(disk_path=tmp_path, write=write, **few))
    instances.append(instance)
    for call in ("get", "put"):
        monkeypatch.setattr(DiskTier, call, unsteady(getattr(DiskTier, call), random.Random(5)))
    chance = random.Random(7)
    engine = instance.scheduler
    waiting: dict[str, list[int]] = {}
    running: set[str] = set()
    loaded = 0
    for number in range(600):
        action = chance.random()
        if action < 0.3 and len(waiting) < 6:
            waiting[f"r{number}"] = prompt(chance.randrange(8), 9 + chance.randrange(60))
        elif action < 0.75 and waiting:
            name = chance.choice(list(waiting))
            gain = engine.lookup(name, waiting[name], 0, NOBODY)
            if gain is not None and chance.random() < 0.8:  # else there is no room in the batch
                tokens = waiting.pop(name)
                running.add(name)
                engine.admit(name, gain, list(range(20)))
                engine.store(name, tokens, len(tokens), len(tokens), list(range(20)))
                loaded += gain
                plan = engine.take_plan()
                instance.workers[0].begin(plan)
                instance.workers[0].end(plan)
        elif action < 0.85 and (waiting or running):
            name = chance.choice([*waiting, *sorted(running)])
            waiting.pop(name, None)
            running.discard(name)
            engine.finish(name, pin_seconds=chance.choice([0.0, 0.0, 0.001]))
        else:
            instance.pump()
    assert loaded > 0
    for name in (*waiting, *running):
        engine.finish(name)
    instance.settle()
    time.sleep(0.002)
    instance.pump()  # drops pins whose time is over
    assert (engine.directory.num_pins, engine.directory.num_open) == (0, 0)
    monkeypatch.undo()
    longest = prompt(99, HOST_CHUNKS * CHUNK_TOKENS + 1)
    instance.serve(longest)
    assert instance.serve(longest).loaded == HOST_CHUNKS * CHUNK_TOKENS, "every slot can be had again"
