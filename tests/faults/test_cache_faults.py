"""Whole instances when a disk fails, fills up or hangs, a thread crashes or a rank dies: a miss, a metric, a log line, no endless wait."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from pathlib import Path

import pytest

from lmc.cache.plan import Plan, Report
from lmc.cache.scheduler.cache import Identity
from lmc.cache.scheduler.presence import Presence
from lmc.cache.tiers import read_loop
from lmc.cache.tiers.disk import DiskTier
from tests import services
from tests.cache.instance import CHUNK_BYTES, Instance, chunk_files, prompt, settings
from tests.faults.test_tier_disk import exit_status, in_child, pretend_cached

pytestmark = pytest.mark.fault

TOKENS = prompt(1, 50)  # six chunks and a bit


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """A folder that holds the chunks of TOKENS."""
    for num_ranks in (1, 2):
        instance = Instance(settings(disk_path=tmp_path), num_ranks)
        instance.serve(TOKENS)
        instance.close()
    return tmp_path


def failures(instance: Instance, operation: str, cause: str) -> float:
    return instance.metric("failure_causes_total", operation=operation, tier="disk", cause=cause)


def test_a_disk_that_fills_up_while_the_engine_runs(tmp_path, caplog):
    """The kernel refuses the writes (of a file beyond the limit, which it cuts short as it does on a full disk)."""
    instance = Instance(settings(disk_path=tmp_path))

    def run() -> None:
        own = Instance(settings(disk_path=tmp_path))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        assert own.serve(TOKENS).loaded == 0
        assert chunk_files(tmp_path) == []
        assert failures(own, "write", "full") == 6
        assert own.serve(TOKENS).sources == {"host": 48}, "host memory serves on"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        own.serve(TOKENS)
        assert len(chunk_files(tmp_path)) == 6, "the next touch writes what is missing"
        assert "failed: disk tier: cannot store" in caplog.text and "File too large" in caplog.text
        own.close()

    assert exit_status(in_child(run)) == 0
    instance.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_disk_that_refuses_writes(instances, tmp_path, monkeypatch, caplog, number):
    instances.append(instance := Instance(settings(disk_path=tmp_path)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", _fails(number))
        assert instance.serve(TOKENS).loaded == 0
    full = number in (errno.ENOSPC, errno.EDQUOT)
    refused = failures(instance, "write", "full" if full else "error")
    assert refused == 6 if full else refused >= 3, "a full disk is no failure, so its breaker stays closed"
    assert refused + failures(instance, "write", "unavailable") == 6
    assert os.strerror(number) in caplog.text and "write of chunk" in caplog.text
    assert chunk_files(tmp_path) == []
    assert instance.serve(TOKENS).sources == {"host": 48}

    def written() -> bool:
        instance.serve(TOKENS)
        return len(chunk_files(tmp_path)) == 6

    services.wait_until(written, "writes after the breaker's back-off")


@pytest.mark.parametrize("cached", [True, False])
def test_a_disk_that_cannot_be_read(instances, warm, monkeypatch, caplog, cached):
    instances.append(instance := Instance(settings(disk_path=warm)))
    with monkeypatch.context() as patch:
        if cached:
            patch.setattr(read_loop, "read_and_hash", lambda *_: (0, 0, True))
        else:
            pretend_cached(patch, False)
        for call in ("pread", "preadv"):
            patch.setattr(os, call, _fails(errno.EIO))
        served = instance.serve(TOKENS)
    assert (served.loaded, served.miss) == (0, "load failed")
    assert failures(instance, "stage", "error") >= 1
    assert "Input/output error" in caplog.text and "stage of chunk" in caplog.text
    instance.serve(TOKENS)  # stores the chunks whose failing copies outlasted the first request
    assert instance.serve(TOKENS).loaded == 48


@pytest.mark.parametrize("error", [RuntimeError("injected"), MemoryError(), SystemExit(3)], ids=repr)
def test_an_io_thread_that_crashes_at_a_load(instances, warm, monkeypatch, caplog, error):
    instances.append(instance := Instance(settings(disk_path=warm, io_threads=1)))
    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "get", _raises(error))
        served = instance.serve(TOKENS)
    assert (served.loaded, served.miss) == (0, "load failed")
    assert failures(instance, "stage", "crash") == 6
    assert "stage of chunk" in caplog.text and "crashed" in caplog.text and type(error).__name__ in caplog.text
    instance.serve(TOKENS)  # stores the chunks whose failing copies outlasted the first request
    assert instance.serve(TOKENS).loaded == 48
    assert instance.scheduler.directory.num_open == instance.scheduler.directory.num_pins == 0


def test_an_io_thread_that_crashes_at_a_store(instances, tmp_path, monkeypatch, caplog):
    instances.append(instance := Instance(settings(disk_path=tmp_path, io_threads=1)))
    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "put", _raises(RuntimeError("injected")))
        instance.serve(TOKENS)
    assert failures(instance, "write", "crash") == 6
    assert "write of chunk" in caplog.text and "RuntimeError: injected" in caplog.text
    instance.serve(TOKENS)
    assert len(chunk_files(tmp_path)) == 6


def test_a_crash_while_a_tier_is_asked_is_an_answer(instances, warm, monkeypatch, caplog):
    """With an hour's deadline: whoever waits for the answer would be seen."""
    patient = settings(disk_path=warm, disk_shared=True, lookup_deadline=3600)
    instances.append(instance := Instance(patient))
    monkeypatch.setattr(Presence, "_contains", _raises(RuntimeError("injected")))
    assert instance.serve(prompt(2, 50)).miss == "remote failed"
    assert instance.metric("ask_failures_total", tier="disk", cause="crash") == 1
    assert "asking the disk tier for chunks crashed" in caplog.text and "RuntimeError: injected" in caplog.text


def test_an_io_thread_that_hangs_delays_nobody_beyond_the_deadline(warm, monkeypatch, caplog):
    instance = Instance(settings(disk_path=warm, io_threads=1, load_deadline=0.2, close_timeout=0.2))
    gate = threading.Event()
    monkeypatch.setattr(DiskTier, "get", lambda *_: gate.wait())
    try:
        assert instance.serve(TOKENS, settle=False).miss == "load deadline"
        assert instance.metric("deadline_exceeded_total") == 1
        assert instance.serve(prompt(2, 50), settle=False).loaded == 0, "others are served"
        instance.close()
    finally:
        gate.set()
    assert "copies not done within 0.2 s" in caplog.text and "load deadline: request" in caplog.text


def test_a_rank_that_dies_before_it_has_loaded(instances, warm, caplog):
    """Its part never arrives, so the request is computed; what it stored or staged last is never believed."""
    instances.append(instance := Instance(settings(disk_path=warm, load_deadline=0.2), 2))
    dead = instance.workers[1]
    dead.begin, dead.end, dead.take_report = _nothing, _nothing, Report
    started = time.monotonic()
    while (gain := instance.scheduler.lookup("r", TOKENS, 0, Identity())) is None:
        instance.pump()
        assert time.monotonic() - started < 120, "the lookup never ended"
    assert gain == 0
    instance.scheduler.admit("r", 0, list(range(13)))
    assert instance.scheduler.explain("r")["miss"] == "load deadline"
    assert "load deadline: request r waits no longer and computes 50 tokens" in caplog.text
    instance.scheduler.store("r", TOKENS, 50, 50, list(range(13)))
    instance.pump()
    instance.scheduler.finish("r")
    assert instance.scheduler.lookup("s", TOKENS, 0, Identity()) in (0, None)
    assert instance.metric("deadline_exceeded_total") == 1
    assert instance.scheduler.stats()["pending_operations"] > 0, "what hangs can be seen"
    instance.scheduler.finish("s")


def test_a_prompt_longer_than_host_memory_says_why_it_is_cut(instances, warm):
    instances.append(instance := Instance(settings(disk_path=warm, host_capacity=4 * CHUNK_BYTES)))
    served = instance.serve(TOKENS)
    assert (served.loaded, served.miss) == (32, "no room to store")


def _fails(number: int):
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def _raises(error: BaseException):
    def call(*_: object) -> None:
        raise error

    return call


def _nothing(plan: Plan, **_: object) -> None:
    pass
