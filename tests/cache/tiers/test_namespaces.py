"""Several namespaces in one folder: what nobody uses makes room, least recently used first, and what is in use stays."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import FORMAT, TierScope, stored_bytes
from lmc.cache.tiers.namespaces import LEASE, list_namespaces
from lmc.errors import TierFull
from tests.cache.instance import CHUNK_BYTES as INSTANCE_CHUNK
from tests.cache.instance import Instance, prompt, settings
from tests.contracts.tier import CHUNK_BYTES, SCOPE, key, load, payload

FILE = stored_bytes(CHUNK_BYTES)


def scope_of(number: int) -> TierScope:
    return replace(SCOPE, namespace=f"{number:016d}")


def open_tier(folder: Path, number: int, files: int, num_ranks: int = 1, rank: int = 0) -> DiskTier:
    scope = replace(scope_of(number), rank=rank)
    return DiskTier(folder, scope, fsync=False, capacity=files * FILE * num_ranks, num_ranks=num_ranks)


def fill(folder: Path, number: int, count: int, used: float) -> None:
    """A namespace of before, last used at that time."""
    tier = open_tier(folder, number, 1000)
    for chunk in range(count):
        tier.put(key(100 * number + chunk), payload(chunk))
    tier.close()
    os.utime(folder / FORMAT / scope_of(number).namespace / LEASE, (used, used))


def chunks(folder: Path) -> dict[int, int]:
    """By number of the namespace."""
    return {int(one.label): one.chunks for one in list_namespaces(folder)}


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_least_recently_used_namespace_makes_room_first(tmp_path: Path) -> None:
    fill(tmp_path, 1, 4, used=1000)
    fill(tmp_path, 2, 4, used=500)
    tier = open_tier(tmp_path, 3, 10)
    tier.put(key(1), payload(1))
    tier.put(key(2), payload(2))
    assert chunks(tmp_path) == {2: 4, 1: 4, 3: 2}
    tier.put(key(3), payload(3))
    assert chunks(tmp_path)[1] == 4 and chunks(tmp_path).get(2, 0) < 4
    for number in range(4, 11):
        tier.put(key(number), payload(number))
        assert total(tmp_path) <= 10 * FILE
    assert chunks(tmp_path) == {3: 10}, "folders that are empty go, too"
    assert all(load(tier, number) == payload(number) for number in range(1, 11))


def test_within_a_namespace_the_oldest_chunks_go_first(tmp_path: Path) -> None:
    fill(tmp_path, 1, 4, used=500)
    folder = tmp_path / FORMAT / scope_of(1).namespace / "r0"
    for age, number in enumerate((102, 100, 103, 101)):
        name = key(number).hex()
        os.utime(folder / name[:2] / name, (age, age))
    open_tier(tmp_path, 2, 4).put(key(1), payload(1))
    old = DiskTier(tmp_path, scope_of(1))
    assert {found for found, _ in old.scan()} <= {key(100), key(103), key(101)}
    assert key(101) in {found for found, _ in old.scan()}


def test_a_namespace_in_use_keeps_its_chunks(tmp_path: Path) -> None:
    fill(tmp_path, 1, 4, used=500)
    living = DiskTier(tmp_path, scope_of(1))
    tier = open_tier(tmp_path, 2, 6)
    for number in range(2):
        tier.put(key(number), payload(number))
    for _ in range(2):
        with pytest.raises(TierFull, match="the folder holds its capacity"):
            tier.put(key(9), payload(9))
    assert chunks(tmp_path) == {1: 4, 2: 2}
    tier.delete(key(0))
    tier.put(key(9), payload(9))
    assert {one.label: one.open for one in list_namespaces(tmp_path)}[scope_of(1).namespace]
    living.close()
    assert not {one.label: one.open for one in list_namespaces(tmp_path)}[scope_of(1).namespace]
    tier._share._full_until = time.monotonic()  # type: ignore[union-attr]
    for number in range(20, 24):
        tier.put(key(number), payload(number))
    assert chunks(tmp_path) == {2: 6}


def test_ranks_share_the_capacity_and_take_over_what_higher_ones_left(tmp_path: Path) -> None:
    for rank in range(4):
        old = open_tier(tmp_path, 1, 1000, num_ranks=4, rank=rank)
        for number in range(4):
            old.put(key(number), payload(number))
        old.close()
    tiers = [open_tier(tmp_path, 2, 8, num_ranks=2, rank=rank) for rank in range(2)]
    for number in range(8):
        for tier in tiers:
            tier.put(key(number), payload(number))
        assert total(tmp_path) <= 16 * FILE
    assert chunks(tmp_path) == {2: 16}


def test_on_the_second_node_of_an_engine_the_ranks_share_the_capacity_too(tmp_path: Path) -> None:
    for number in (1, 2):
        tiers = [open_tier(tmp_path, number, 8, num_ranks=2, rank=rank) for rank in (2, 3)]
        for index in range(8):
            for tier in tiers:
                tier.put(key(index), payload(index))
            assert total(tmp_path) <= 16 * FILE
        for tier in tiers:
            tier.close()
        assert chunks(tmp_path) == {number: 16}  # what was there before made room


def test_model_after_model_in_one_folder_stays_within_the_capacity(tmp_path: Path) -> None:
    capacity = 30 * stored_bytes(INSTANCE_CHUNK)
    for model in ("one", "two", "three"):
        instance = Instance(settings(disk_path=tmp_path, disk_capacity=capacity), model=model)
        for seed in range(6):
            instance.serve(prompt(seed, 50))
        assert instance.scheduler.directory.usage()["disk"][0] == 30, "all of it is the living model's"
        instance.close()
        assert total(tmp_path) <= capacity


def test_chunks_of_one_s_own_make_room_where_others_fill_the_folder(tmp_path: Path) -> None:
    """A file system that is fuller than the capacity says is the same to the directory: a put that finds no room."""
    file = stored_bytes(INSTANCE_CHUNK)
    other = Instance(settings(disk_path=tmp_path, disk_capacity=40 * file), model="other")
    for seed in range(4):
        other.serve(prompt(seed, 50))
    instance = Instance(settings(disk_path=tmp_path, disk_capacity=40 * file, host_capacity=12 * INSTANCE_CHUNK))
    for seed in range(10):
        instance.serve(prompt(seed, 50))
    assert total(tmp_path) <= 40 * file
    assert instance.metric("failure_causes_total", operation="write", tier="disk", cause="full") > 0
    before = instance.metric("written_chunks_total", tier="disk")
    for seed in range(20, 30):
        instance.serve(prompt(seed, 50))
    assert instance.metric("written_chunks_total", tier="disk") > before, "new chunks come in place of old ones"
    assert len(list((tmp_path / FORMAT / other.scheduler.namespace.label()).rglob("*"))) > 24, "the other's stay"
    instance.close()
    other.close()
