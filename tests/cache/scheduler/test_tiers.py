"""CacheScheduler and the tiers below the host: write modes, bounds, the end, and folders that several instances share."""

from __future__ import annotations

import threading
import time

import pytest

from lmc.cache.scheduler.cache import Identity
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import stored_bytes
from lmc.errors import ConfigError
from tests.cache.instance import CHUNK_BYTES, Instance, chunk_files, prompt, serve_side_by_side, settings, start

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
        assert instance.scheduler.directory.num_writing == {"disk": 2}
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
    assert instance.scheduler.directory.usage()["host"][0] == 18


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
        return put(self, *args)

    monkeypatch.setattr(DiskTier, "put", slow_put)
    instance.serve(prompt(1, 50), settle=False)
    instance.close()
    assert len(chunk_files(tmp_path)) == 6


def test_close_gives_up_after_its_limit(tmp_path, monkeypatch, caplog):
    instance = Instance(settings(disk_path=tmp_path, io_threads=1, close_timeout=0.1))
    gate = threading.Event()
    monkeypatch.setattr(DiskTier, "put", lambda *_: gate.wait())
    instance.serve(prompt(1, 50), settle=False)
    instance.close()  # else the test would never end
    gate.set()
    assert "6 copies not done" in caplog.text


# Sharing


def test_instances_share_a_folder(instances, tmp_path):
    one = start(instances, disk_path=tmp_path, disk_shared=True, lookup_deadline=60)
    two = start(instances, disk_path=tmp_path, disk_shared=True, lookup_deadline=60)
    for seed in (1, 2, 3):
        tokens = prompt(seed, 50)
        one.serve(tokens)
        assert two.serve(tokens).sources == {"disk": 48}
        assert two.serve(tokens).sources == {"host": 48}
    assert two.metric("ask_seconds_count", tier="disk") == 3, "a hit at the first question"
    assert two.scheduler.directory.usage()["disk"][0] == 0, "the other one's chunks count against its own capacity"


def test_an_instance_that_does_not_share_sees_only_its_own(instances, tmp_path):
    one = start(instances, disk_path=tmp_path)
    two = start(instances, disk_path=tmp_path)
    one.serve(prompt(1, 50))
    assert two.serve(prompt(1, 50)).loaded == 0


def test_reset_means_new_names_where_others_write(instances, tmp_path):
    one = start(instances, disk_path=tmp_path, disk_shared=True, lookup_deadline=60)
    two = start(instances, disk_path=tmp_path, disk_shared=True, lookup_deadline=60)
    tokens = prompt(1, 50)
    one.serve(tokens)
    two.serve(tokens)
    two.scheduler.reset()
    again = two.serve(tokens)
    assert (again.loaded, again.miss) == (0, "never stored"), "nobody's salt differs"
    assert two.serve(tokens).loaded == 48


def test_evictors_in_one_folder_never_break_a_reader(instances, tmp_path):
    """Each instance fills the folder beyond its capacity all the time; serve() compares every byte."""
    shared = {
        "disk_path": tmp_path,
        "disk_shared": True,
        "lookup_deadline": 60,
        "disk_capacity": 20 * stored_bytes(CHUNK_BYTES),
    }
    few = {"host_capacity": 16 * CHUNK_BYTES}
    pair = [start(instances, **shared, **few) for _ in range(2)]
    serve_side_by_side(pair, 40)
    assert all(instance.metric("staged_chunks_total", tier="disk") > 0 for instance in pair)
    assert all(instance.metric("evicted_chunks_total", tier="disk") > 0 for instance in pair)
