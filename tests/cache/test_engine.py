"""CacheEngine and CacheWorker together, without an engine: every byte that is loaded is compared with what was stored."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator

import pytest

from lmc.cache import block_copies
from lmc.cache.engine import Identity
from lmc.cache.tiers.disk import DiskTier
from lmc.errors import ConfigError, TierError, TransferError
from tests.cache.instance import CHUNK_BYTES, Instance, Served, chunk_files, prompt, settings


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def instances() -> Iterator[list[Instance]]:
    """What a test puts in is closed after it."""
    opened: list[Instance] = []
    yield opened
    for instance in opened:
        instance.close()


def start(instances: list[Instance], num_ranks: int = 1, clock=time.monotonic, **values: object) -> Instance:
    instances.append(Instance(settings(**values), num_ranks, clock))
    return instances[-1]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_repeated_prompt_is_loaded_byte_for_byte(instances, num_ranks):
    instance = start(instances, num_ranks)
    tokens = prompt(1, 50)
    assert instance.serve(tokens) == Served(0, {}, "never stored", 0)
    assert instance.serve(tokens) == Served(48, {"host": 48}, None, 0)
    assert instance.serve(tokens[:20] + prompt(2, 20)).loaded == 16
    assert instance.metric("hit_tokens_total", tier="host") == 64
    assert instance.metric("miss_tokens_total", reason="never stored") == 50 + 24


def test_the_last_token_is_never_offered(instances):
    instance = start(instances)
    tokens = prompt(1, 48)
    instance.serve(tokens)
    assert instance.serve(tokens).loaded == 40


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_chunks_survive_a_restart_on_disk(instances, tmp_path, num_ranks):
    tokens = prompt(1, 50)
    first = Instance(settings(disk_path=tmp_path), num_ranks)
    first.serve(tokens)
    first.close()
    second = start(instances, num_ranks, disk_path=tmp_path)
    served = second.serve(tokens)
    assert served.loaded == 48 and served.sources == {"disk": 48} and served.polls > 0
    assert second.serve(tokens).sources == {"host": 48}
    assert second.metric("staged_chunks_total", tier="disk") == 6


def test_tenants_and_adapters_share_nothing(instances):
    instance = start(instances)
    tokens = prompt(1, 50)
    instance.serve(tokens, Identity(tenant="a"))
    assert instance.serve(tokens, Identity(tenant="b")).miss == "salt differs"
    assert instance.serve(tokens, Identity(tenant="a", lora="x")).miss == "salt differs"
    assert instance.serve(tokens, Identity(tenant="a")).loaded == 48


# Failures on one rank


def test_a_chunk_that_one_rank_failed_to_store_is_a_miss_on_all(instances, monkeypatch):
    instance = start(instances, 2)
    tokens = prompt(1, 50)
    with monkeypatch.context() as patch:
        patch.setattr(instance.workers[1].copier.backend, "execute", _raise(TransferError("injected")))
        instance.serve(tokens)
    assert instance.engine.directory.usage()["host"][0] == 0
    assert instance.metric("failure_causes_total", operation="store", tier="host", cause="copy") == 6
    assert instance.serve(tokens).miss == "store failed"
    assert instance.serve(tokens).loaded == 48


def test_a_chunk_that_one_rank_has_not_reported_is_not_visible(instances):
    instance = start(instances, 2)
    tokens = prompt(1, 50)
    engine = instance.engine
    assert engine.lookup("r", tokens, 0, Identity()) == 0
    engine.admit("r", 0, [])
    engine.store("r", tokens, 50, 50, list(range(13)))
    plan = engine.take_plan()
    for worker in instance.workers:
        worker.begin(plan)
        worker.end(plan)
    engine.apply(instance.workers[0].take_report())
    assert engine.lookup("other", tokens, 0, Identity()) == 0
    engine.apply(instance.workers[1].take_report())
    assert engine.lookup("third", tokens, 0, Identity()) == 48


def test_a_failed_load_is_recomputed_and_not_offered_again(instances, monkeypatch):
    instance = start(instances, 2)
    tokens = prompt(1, 50)
    instance.serve(tokens)
    copier = instance.workers[0].copier
    monkeypatch.setattr(copier, "backend", FailsOnce(copier.backend))
    assert instance.serve(tokens).loaded == 0
    assert instance.metric("failure_causes_total", operation="load", tier="host", cause="copy") == 6
    assert instance.metric("removed_chunks_total", tier="host", cause="failed") == 6
    assert instance.serve(tokens).loaded == 48, "what was recomputed is stored again"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_of_one_rank_is_a_miss_and_is_replaced(instances, tmp_path, damage):
    tokens = prompt(1, 50)
    first = Instance(settings(disk_path=tmp_path), 2)
    first.serve(tokens)
    first.close()
    second = start(instances, 2, disk_path=tmp_path)
    for file in chunk_files(tmp_path, rank=1):
        if damage == "flip":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        elif damage == "truncate":
            os.truncate(file, 5000 - 4096)
        else:
            file.unlink()
    served = second.serve(tokens)
    assert served.loaded == 0
    cause = "absent" if damage == "delete" else "corrupt"
    assert second.metric("failure_causes_total", operation="stage", tier="disk", cause=cause) > 0
    assert second.serve(tokens).sources == {"host": 48}
    second.settle()
    second.close()
    instances.clear()
    third = start(instances, 2, disk_path=tmp_path)
    assert third.serve(tokens).sources == {"disk": 48}


@pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "by layer"])
def test_copies_on_streams_are_ordered_with_the_engines_own_work(by_layer, monkeypatch):
    """Copies come late; whatever reads a block or a slot too early, or overwrites it too soon, gives wrong bytes in serve()."""
    monkeypatch.setattr(block_copies, "LAYER_BYTES", 1)
    instance = Instance(settings(host_capacity=2 * 16 * CHUNK_BYTES), 2, streams=True, by_layer=by_layer)
    chooser = random.Random(3)
    for _ in range(120):
        length = chooser.randrange(9, 90)
        instance.serve(prompt(chooser.randrange(4), length), settle=chooser.random() < 0.3)
    instance.settle()
    assert instance.metric("hit_tokens_total", tier="host") > 0
    assert instance.metric("evicted_chunks_total", tier="host") > 0
    instance.close()


# Deadlines


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
        get(self, key, out)

    monkeypatch.setattr(DiskTier, "get", slow_get)
    try:
        assert instance.engine.lookup("r", tokens, 0, Identity()) is None
        instance.pump()
        clock.now += 1.9
        assert instance.engine.lookup("r", tokens, 0, Identity()) is None
        clock.now += 0.2
        assert instance.engine.lookup("r", tokens, 0, Identity()) == 0
        instance.engine.admit("r", 0, [])
        assert instance.engine.explain("r")["miss"] == "load deadline"
        assert instance.metric("deadline_exceeded_total") == 1
        instance.engine.finish("r")
    finally:
        gate.set()
    instance.settle()
    assert instance.engine.directory.num_pins == 0
    assert instance.serve(tokens).sources == {"host": 48}


def test_stages_that_nobody_waits_for_are_not_begun(instances, tmp_path, monkeypatch):
    tokens = prompt(1, 50)
    first = Instance(settings(disk_path=tmp_path))
    first.serve(tokens)
    first.close()
    instance = start(instances, disk_path=tmp_path, load_deadline=0.05, io_threads=1)
    get = DiskTier.get

    def slow_get(self, key, out):
        time.sleep(0.1)
        get(self, key, out)

    monkeypatch.setattr(DiskTier, "get", slow_get)
    assert instance.serve(tokens).miss == "load deadline"
    assert instance.metric("failure_causes_total", operation="stage", tier="disk", cause="late") == 5
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
    instance.engine._presence._tiers["disk"] = [remote]
    tokens = prompt(1, 50)
    ask = lambda name: instance.engine.lookup(name, tokens, 0, Identity())  # noqa: E731
    assert ask("r") is None
    clock.now += 0.4
    assert ask("r") is None
    clock.now += 0.2
    assert ask("r") == 0
    instance.engine.admit("r", 0, [])
    assert instance.engine.explain("r")["miss"] == "remote deadline"
    instance.engine.finish("r")
    remote.gate.set()  # the late answer serves the next request
    until = time.monotonic() + 5
    while not instance.engine.directory.known_remote()["disk"] and time.monotonic() < until:
        ask("s")
        time.sleep(0.01)
    assert instance.engine.directory.known_remote() == {"disk": 6}
    instance.engine.finish("s")


def test_two_ranks_must_both_have_a_remote_chunk(instances, tmp_path):
    first = Instance(settings(disk_path=tmp_path), 2)
    second = start(instances, 2, disk_path=tmp_path, disk_shared=True, lookup_deadline=5)
    tokens = prompt(1, 50)
    first.serve(tokens)
    first.close()
    for file in chunk_files(tmp_path, rank=1):
        file.unlink()
    served = second.serve(tokens)
    assert served.loaded == 0 and served.miss == "never stored"
    assert second.metric("failures_total", operation="stage") == 0


# Reasons


def test_reasons_of_misses(instances):
    clock = Clock()
    instance = start(instances, clock=clock, host_capacity=6 * CHUNK_BYTES, ttl=100.0, min_load_tokens=16)
    tokens = prompt(1, 50)
    instance.serve(tokens)
    assert instance.serve(tokens[:9]).miss == "below minimum"
    instance.serve(prompt(2, 50))
    assert instance.serve(tokens).miss == "evicted from host"
    clock.now += 101
    assert instance.serve(tokens).miss == "expired"
    instance.engine.reset()
    assert instance.serve(tokens).miss == "cleared"
    assert instance.metric("removed_chunks_total", tier="host", cause="expired") == 6
    assert instance.metric("removed_chunks_total", tier="host", cause="cleared") == 6
    assert instance.metric("removed_chunks_total", tier="host", cause="room") >= 6


def test_fixed_ttl_is_not_renewed_by_touches(instances):
    for mode, loaded in (("sliding", 48), ("fixed", 0)):
        clock = Clock()
        instance = start(instances, clock=clock, ttl=100.0, ttl_mode=mode)
        tokens = prompt(1, 50)
        instance.serve(tokens)
        for _ in range(3):
            clock.now += 40
            served = instance.serve(tokens)
        assert served.loaded == loaded, mode


def test_a_clock_that_jumps_back_expires_nothing_early_and_blocks_nothing(instances):
    clock = Clock()
    instance = start(instances, clock=clock, ttl=100.0)
    tokens = prompt(1, 50)
    instance.serve(tokens)
    clock.now -= 500
    assert instance.serve(tokens).loaded == 48
    clock.now += 560
    assert instance.serve(tokens).loaded == 48


# Write modes and bounds


def test_write_around_writes_at_the_nth_touch(instances, tmp_path):
    instance = start(instances, disk_path=tmp_path, write="around", write_touches=2)
    tokens = prompt(1, 50)
    instance.serve(tokens)
    assert not chunk_files(tmp_path)
    instance.serve(tokens)
    assert len(chunk_files(tmp_path)) == 6


def test_write_back_writes_whole_chains_when_slots_run_out(instances, tmp_path):
    instance = start(instances, disk_path=tmp_path, write="back", host_capacity=64 * CHUNK_BYTES)
    prompts = [prompt(seed, 50) for seed in range(16)]
    instance.serve(prompts[0])
    assert not chunk_files(tmp_path)
    for tokens in prompts[1:]:
        instance.serve(tokens)
    served = [instance.serve(tokens) for tokens in prompts]
    assert all(one.loaded == 48 for one in served)
    assert any("disk" in one.sources for one in served)
    assert instance.metric("dropped_chunks_total", what="write") == 0


def test_a_full_write_queue_drops_and_counts(instances, tmp_path, monkeypatch):
    instance = start(instances, disk_path=tmp_path, queue_depth=2)
    gate = threading.Event()
    put = DiskTier.put
    monkeypatch.setattr(DiskTier, "put", lambda self, *args: gate.wait(20) and put(self, *args))
    try:
        instance.serve(prompt(1, 50), settle=False)
        assert instance.engine.directory.num_writing == {"disk": 2}
        assert instance.metric("write_queue", tier="disk") == 2
    finally:
        gate.set()
    instance.settle()
    assert len(chunk_files(tmp_path)) == 2
    assert instance.metric("dropped_chunks_total", what="write") > 0


def test_a_tenant_at_its_quota_evicts_its_own(instances):
    instance = start(instances, host_capacity=24 * CHUNK_BYTES, tenant_quota="50%")
    quiet, loud = Identity(tenant="quiet"), Identity(tenant="loud")
    tokens = prompt(0, 50)
    instance.serve(tokens, quiet)
    for seed in range(1, 8):
        instance.serve(prompt(seed, 50), loud)
    assert instance.serve(tokens, quiet).loaded == 48
    assert instance.metric("removed_chunks_total", tier="host", cause="quota") == 5 * 6
    assert instance.engine.directory.usage()["host"][0] == 18


def test_settings_that_cannot_work_are_refused(tmp_path):
    for values, text in (
        ({"host_capacity": 10}, "less than one chunk"),
        ({"disk_path": tmp_path, "disk_capacity": 10}, "smaller than one chunk"),
        ({"tenant_quota": 10}, "tenant_quota"),
    ):
        with pytest.raises(ConfigError, match=text):
            Instance(settings(**values))


# The end


def test_close_lets_writes_end(tmp_path, monkeypatch):
    instance = Instance(settings(disk_path=tmp_path, io_threads=1))
    put = DiskTier.put

    def slow_put(self, *args):
        time.sleep(0.02)
        put(self, *args)

    monkeypatch.setattr(DiskTier, "put", slow_put)
    instance.serve(prompt(1, 50), settle=False)
    instance.close()
    assert len(chunk_files(tmp_path)) == 6


def test_close_gives_up_after_its_limit(tmp_path, monkeypatch, caplog):
    instance = Instance(settings(disk_path=tmp_path, io_threads=1, close_timeout=0.1))
    gate = threading.Event()
    monkeypatch.setattr(DiskTier, "put", lambda *_: gate.wait(20))
    instance.serve(prompt(1, 50), settle=False)
    started = time.monotonic()
    instance.close()
    assert time.monotonic() - started < 2
    gate.set()
    assert "6 copies not done" in caplog.text


# Sharing


def test_instances_share_a_folder(instances, tmp_path):
    one = start(instances, disk_path=tmp_path, disk_shared=True, lookup_deadline=5)
    two = start(instances, disk_path=tmp_path, disk_shared=True, lookup_deadline=5)
    tokens = prompt(1, 50)
    one.serve(tokens)
    written = time.monotonic()
    assert two.serve(tokens).sources == {"disk": 48}
    assert time.monotonic() - written < 1
    assert two.serve(tokens).sources == {"host": 48}
    assert two.engine.directory.usage()["disk"][0] == 0, "the other one's chunks count against its own capacity"


def test_an_instance_that_does_not_share_sees_only_its_own(instances, tmp_path):
    one = start(instances, disk_path=tmp_path)
    two = start(instances, disk_path=tmp_path)
    one.serve(prompt(1, 50))
    assert two.serve(prompt(1, 50)).loaded == 0


def test_reset_means_new_names_where_others_write(instances, tmp_path):
    one = start(instances, disk_path=tmp_path, disk_shared=True, lookup_deadline=5)
    two = start(instances, disk_path=tmp_path, disk_shared=True, lookup_deadline=5)
    tokens = prompt(1, 50)
    one.serve(tokens)
    two.serve(tokens)
    assert two.engine.reset()
    assert two.serve(tokens).loaded == 0
    assert two.serve(tokens).loaded == 48


def test_evictors_in_one_folder_never_break_a_reader(instances, tmp_path):
    """Each instance fills the folder beyond its capacity all the time; serve() compares every byte."""
    shared = {"disk_path": tmp_path, "disk_shared": True, "lookup_deadline": 5, "disk_capacity": 20 * CHUNK_BYTES}
    few = {"host_capacity": 16 * CHUNK_BYTES}
    pair = [start(instances, **shared, **few) for _ in range(2)]
    errors: list[BaseException] = []

    def work(instance: Instance, seed: int) -> None:
        try:
            for turn in range(40):
                instance.serve(prompt((turn * seed) % 7, 20 + 8 * (turn % 4)))
                instance.serve(prompt(100 * seed + turn % 5, 36))
        except BaseException as error:
            errors.append(error)
            raise

    threads = [
        threading.Thread(target=work, args=(instance, seed)) for instance, seed in zip(pair, (1, 3), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(instance.metric("staged_chunks_total", tier="disk") > 0 for instance in pair)
    assert all(instance.metric("evicted_chunks_total", tier="disk") > 0 for instance in pair)


class FailsOnce:
    def __init__(self, backend) -> None:
        self._backend = backend
        self._failed = False

    def execute(self, descriptors, stream: int = 0) -> None:
        if not self._failed:
            self._failed = True
            raise TransferError("injected")
        self._backend.execute(descriptors, stream)


def _raise(error: Exception):
    def call(*arguments: object, **named: object) -> None:
        raise error

    return call
