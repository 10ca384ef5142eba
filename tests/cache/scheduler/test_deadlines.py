"""CacheScheduler and slow tiers: nobody waits longer than the deadline."""

from __future__ import annotations

import threading
import time

from lmc.cache.scheduler.cache import Identity
from lmc.cache.tiers.breaker import Breaker
from lmc.cache.tiers.disk import DiskTier
from lmc.errors import TierError
from tests.cache.instance import Clock, Instance, chunk_files, prompt, settings, start


def test_a_request_waits_for_the_disk_no_longer_than_the_deadline(instances, tmp_path, monkeypatch):
    clock = Clock()
    tokens = prompt(1, 50)
    first = Instance(settings(disk_path=tmp_path))
    first.serve(tokens)
    first.close()
    instance = start(instances, clock=clock, disk_path=tmp_path, load_deadline=2.0)
    gate = threading.Event()
    get = DiskTier.get

    def slow_get(self, key, out):
        assert gate.wait(20)
        return get(self, key, out)

    monkeypatch.setattr(DiskTier, "get", slow_get)
    try:
        assert instance.scheduler.lookup("r", tokens, 0, Identity()) is None
        instance.pump()
        clock.now += 1.9
        assert instance.scheduler.lookup("r", tokens, 0, Identity()) is None
        clock.now += 0.2
        assert instance.scheduler.lookup("r", tokens, 0, Identity()) == 0
        instance.scheduler.admit("r", 0, [])
        assert instance.scheduler.explain("r")["miss"] == "load deadline"
        assert instance.metric("deadline_exceeded_total") == 1
        instance.scheduler.finish("r")
    finally:
        gate.set()
    instance.settle()
    assert instance.scheduler.directory.num_pins == 0
    assert instance.serve(tokens).sources == {"host": 48}


def test_stages_that_nobody_waits_for_are_not_begun(instances, tmp_path, monkeypatch):
    tokens = prompt(1, 50)
    first = Instance(settings(disk_path=tmp_path))
    first.serve(tokens)
    first.close()
    instance = start(instances, disk_path=tmp_path, load_deadline=0.05, io_threads=1)
    get, begun = DiskTier.get, []

    def slow_get(self, key, out):
        begun.append(key)
        time.sleep(0.1)
        return get(self, key, out)

    monkeypatch.setattr(DiskTier, "get", slow_get)
    assert instance.serve(tokens).miss == "load deadline"
    assert len(begun) <= 1, "on a busy machine the thread may come too late for the first, too"
    late = instance.metric("failure_causes_total", operation="stage", tier="disk", cause="late")
    assert late == 6 - len(begun)
    assert len(chunk_files(tmp_path)) == 6


class Remote:
    """Stands for the tier that a Presence asks."""

    name = "redis"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.present = True
        self.calls = 0

    def contains(self, keys):
        self.calls += 1
        if not self.gate.wait(20):
            raise TierError("redis tier: injected")
        return [self.present] * len(keys)

    def close(self) -> None:
        pass


def test_a_request_waits_for_a_remote_answer_no_longer_than_the_deadline(instances, tmp_path):
    clock, remote = Clock(), Remote()
    instance = start(instances, clock=clock, disk_path=tmp_path, disk_shared=True, lookup_deadline=0.5)
    instance.scheduler._presence._tiers["disk"] = [Breaker(remote)]
    tokens = prompt(1, 50)
    ask = lambda name: instance.scheduler.lookup(name, tokens, 0, Identity())  # noqa: E731
    assert ask("r") is None
    clock.now += 0.4
    assert ask("r") is None
    clock.now += 0.2
    assert ask("r") == 0
    instance.scheduler.admit("r", 0, [])
    assert instance.scheduler.explain("r")["miss"] == "remote deadline"
    instance.scheduler.finish("r")
    remote.gate.set()  # the late answer serves the next request
    until = time.monotonic() + 60
    while not instance.scheduler.directory.known_remote()["disk"] and time.monotonic() < until:
        ask("s")
        time.sleep(0.01)
    assert instance.scheduler.directory.known_remote() == {"disk": 6}
    instance.scheduler.finish("s")


def test_two_ranks_must_both_have_a_remote_chunk(instances, tmp_path):
    first = Instance(settings(disk_path=tmp_path), 2)
    second = start(instances, 2, disk_path=tmp_path, disk_shared=True, lookup_deadline=60)
    tokens = prompt(1, 50)
    first.serve(tokens)
    first.close()
    for file in chunk_files(tmp_path, rank=1):
        file.unlink()
    served = second.serve(tokens)
    assert served.loaded == 0 and served.miss == "never stored"
    assert second.metric("failures_total", operation="stage") == 0
