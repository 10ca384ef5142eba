"""A restart: which chunk continues which is known again, so a tier stays prefix-closed and children go first."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from lmc.cache.directory import Capacity, Directory
from lmc.cache.directory.restore import youngest_first
from lmc.cache.keys import ChunkKey
from lmc.cache.policy.registry import get_policy
from lmc.cache.tiers.disk import DiskTier
from lmc.probe.inspect import inspect_file
from tests.cache.instance import CHUNK_BYTES, Instance, chunk_files, prompt, settings
from tests.contracts.tier import SCOPE, key, payload
from tests.services import wait_until


def name(number: int) -> ChunkKey:
    return ChunkKey(blake3(b"%d" % number).digest())


@st.composite
def forests(draw: st.DrawFn) -> tuple[list[ChunkKey], dict[ChunkKey, ChunkKey]]:
    """Keys in any order of age, some of them missing, and the parent of each chunk that has one."""
    above = draw(st.lists(st.integers(-1, 20), min_size=1, max_size=20))
    parents = {name(node): name(parent % node) for node, parent in enumerate(above) if node and parent >= 0}
    keys = [name(node) for node in draw(st.permutations(range(len(above))))]
    return keys[draw(st.integers(0, 3)) :], parents


@given(
    forests(),
    st.integers(1, 20),
    st.sampled_from(["lru", "fifo", "lfu", "sieve", "s3fifo", "arc", "2q", "lirs", "gdsf"]),
)
def test_what_is_kept_and_what_evictions_leave_is_prefix_closed(forest, capacity, policy):
    keys, parents = forest
    directory = Directory(2, {"disk": Capacity.of_chunks(capacity)}, get_policy(policy))
    surplus = directory.restore("disk", keys, 0.0, parents)
    assert len(surplus) == max(0, len(keys) - capacity)
    on_disk = set(keys) - set(surplus)
    directory.check()
    for step in range(capacity):
        gone = {one for one in on_disk if not directory.tiers_of(one)}
        on_disk -= gone
        for one in on_disk:
            assert parents.get(one) not in {*surplus, *(set(keys) - on_disk)}, "a chunk outlived the one before it"
        tickets = directory.store([name(1000 + step)], 0.0)
        while tickets:
            for ticket in tickets:
                directory.complete(ticket.operation, None, 0.0)
            tickets = directory.take_tickets()
        directory.check()


@given(forests(), st.data())
def test_what_is_kept_is_as_much_as_fits_by_its_real_sizes(forest, data):
    keys, parents = forest
    sizes = {key: data.draw(st.integers(1, 10)) for key in keys if data.draw(st.booleans())}
    capacity = Capacity(data.draw(st.integers(10, 100)), 10, data.draw(st.integers(1, 20)))
    directory = Directory(2, {"disk": capacity}, get_policy("lru"))
    surplus = directory.restore("disk", keys, 0.0, parents, sizes)
    kept = [sizes.get(key, 10) for key in keys if key not in set(surplus)]
    assert directory.room()["disk"] == (sum(kept), capacity.num_bytes)
    assert not surplus or len(kept) == capacity.chunks or sum(kept) + sizes.get(surplus[-1], 10) > capacity.num_bytes
    directory.check()


@given(st.lists(st.integers(0, 9)), st.dictionaries(st.integers(0, 9), st.integers(0, 9)))
def test_any_nonsense_in_footers_leaves_every_key_once(order, above):
    keys = [name(number) for number in order]
    parents = {name(child): name(parent) for child, parent in above.items()}
    assert sorted(youngest_first(keys, parents)) == sorted(set(keys))
    directory = Directory(2, {"disk": Capacity.of_chunks(10)}, get_policy("lru"))
    assert directory.restore("disk", keys, 0.0, parents) == []
    directory.check()
    assert directory.clear() == 0


def test_a_chunk_is_as_young_as_the_youngest_that_continues_it():
    old, young = [name(number) for number in range(3)], [name(number) for number in range(10, 13)]
    parents = {old[1]: old[0], old[2]: old[1], young[1]: young[0], young[2]: old[0]}
    listed = [*old, *young]
    assert youngest_first(listed, parents) == [old[0], young[2], young[0], young[1], old[1], old[2]]


def closed(folder: Path) -> int:
    """Checks that no file lacks its parent; returns how many there are."""
    footers = [inspect_file(path).footer for path in chunk_files(folder)]
    keys = {footer.key for footer in footers if footer}
    assert all(footer is not None and footer.parent in {None, *keys} for footer in footers)
    return len(keys)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_evictions_after_a_restart_take_children_first(tmp_path, num_ranks):
    shared = prompt(1, 24)
    prompts = [shared + prompt(seed, 24) for seed in (2, 3, 4)]
    few = {"disk_path": tmp_path, "host_capacity": 40 * CHUNK_BYTES * num_ranks}
    first = Instance(settings(**few), num_ranks)
    for tokens in prompts:
        first.serve(tokens)
    first.close()
    assert closed(tmp_path) == 12
    per_chunk = first.config.disk.capacity // first.scheduler.directory.usage()["disk"][1]
    small = settings(**few, disk_capacity=6 * per_chunk)
    second = Instance(small, num_ranks)
    try:
        second.settle()  # submits the deletions, for which nobody waits
        wait_until(lambda: len(chunk_files(tmp_path)) <= 6, "the deletion of what is too much")
        assert closed(tmp_path) > 0
        assert second.serve([*shared, 0]).loaded == 24, "the part that all prompts share is the last to go"
        for seed in range(10, 16):
            second.serve(prompt(seed, 24))
            assert 0 < closed(tmp_path) <= 6
            second.scheduler.directory.check()
    finally:
        second.close()


def test_parents_come_from_the_footers(tmp_path, caplog, monkeypatch):
    tier = DiskTier(tmp_path, SCOPE)
    for number in range(5):
        tier.put(key(number), payload(number), key(number - 1) if number else None)
    tier.put(key(7), payload(7), key(6))
    listed = [stored for stored, _ in tier.scan()]
    wanted = {key(number): key(number - 1) for number in (1, 2, 3, 4, 7)}
    assert tier.parents([*listed, key(9)]) == wanted
    damaged = next(path for path in tmp_path.rglob(key(2).hex()))
    damaged.write_bytes(bytes(100))
    assert tier.parents(listed) == {child: parent for child, parent in wanted.items() if child != key(2)}
    ticks = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    assert len(tier.parents(listed, seconds=2.0)) < 3
    assert "footers in" in caplog.text and "within 2 s" in caplog.text


def test_the_parent_changes_nothing_of_what_is_loaded(tmp_path):
    tier = DiskTier(tmp_path, SCOPE)
    numbers = random.Random(1)
    for number in range(20):
        tier.put(key(number), payload(number), ChunkKey(numbers.randbytes(32)))
        out = memoryview(bytearray(SCOPE.chunk_bytes))
        tier.get(key(number), out)
        assert out == payload(number)


def test_chunks_of_another_version_are_named_at_the_start(tmp_path, caplog):
    (tmp_path / "v1" / SCOPE.namespace).mkdir(parents=True)
    DiskTier(tmp_path, SCOPE)
    assert f"another version of lmc has stored chunks in {tmp_path / 'v1'}; delete it if none runs" in caplog.text
