"""CacheScheduler and CacheWorker together, without an engine: every byte that is loaded is compared with what was stored."""

from __future__ import annotations

import os
import random

import pytest

from lmc.cache.scheduler.cache import Identity
from lmc.cache.worker import block_copies
from lmc.errors import TransferError
from tests.cache.instance import CHUNK_BYTES, Clock, Instance, Served, chunk_files, prompt, settings, start


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
    assert instance.scheduler.directory.usage()["host"][0] == 0
    assert instance.metric("failure_causes_total", operation="store", tier="host", cause="copy") == 6
    assert instance.serve(tokens).miss == "store failed"
    assert instance.serve(tokens).loaded == 48


def test_a_chunk_that_one_rank_has_not_reported_is_not_visible(instances):
    instance = start(instances, 2)
    tokens = prompt(1, 50)
    engine = instance.scheduler
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


def test_chunks_that_a_request_failed_to_load_are_not_offered_to_it_again(instances, monkeypatch):
    """Not even when another request has stored them anew: what fails each time must not be tried for ever."""
    instance = start(instances)
    tokens = prompt(1, 50)
    instance.serve(tokens)
    engine, (worker,) = instance.scheduler, instance.workers
    assert engine.lookup("r", tokens, 0, Identity()) == 48
    engine.admit("r", 48, list(range(13)))
    with monkeypatch.context() as patch:
        patch.setattr(worker.copier, "backend", FailsOnce(worker.copier.backend))
        plan = engine.take_plan()
        worker.begin(plan)
        worker.end(plan)
        instance.pump()
    instance.serve(tokens)
    assert engine.lookup("r", tokens, 0, Identity()) == 0
    assert engine.lookup("other", tokens, 0, Identity()) == 48
    for name in ("r", "other"):
        engine.finish(name)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("flip", "payload does not match its checksum"),
        ("truncate", "the file has 904 bytes instead of 4480"),
        ("older", "the footer is of version 1; this lmc reads version 4"),
        ("delete", ""),  # another instance may do so
    ],
)
def test_a_damaged_file_of_one_rank_is_a_miss_and_is_replaced(instances, tmp_path, caplog, damage, said):
    tokens = prompt(1, 50)
    first = Instance(settings(disk_path=tmp_path), 2)
    first.serve(tokens)
    first.close()
    second = start(instances, 2, disk_path=tmp_path)
    for file in chunk_files(tmp_path, rank=1):
        content = bytearray(file.read_bytes())
        if damage == "flip":
            content[0] ^= 1
            file.write_bytes(content)
        elif damage == "older":
            content[CHUNK_BYTES + 8] = 1
            file.write_bytes(content)
        elif damage == "truncate":
            os.truncate(file, 5000 - 4096)
        else:
            file.unlink()
    served = second.serve(tokens)
    assert served.loaded == 0
    cause = "absent" if damage == "delete" else "corrupt"
    assert second.metric("failure_causes_total", operation="stage", tier="disk", cause=cause) > 0
    assert said in caplog.text
    second.serve(tokens)  # stores the chunks whose failing copies outlasted the first request
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
    instance.scheduler.reset()
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
