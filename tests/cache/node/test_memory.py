"""The memory that namespaces share: no two slots meet, an extent has one owner, and nothing is lost."""

from __future__ import annotations

import fcntl
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.cache.directory import Directory, Ticket
from lmc.cache.keys import ChunkKey
from lmc.cache.node.memory import UNIT, Extents, Memory, Places, RankSlots, map_memory, whole_pages
from lmc.cache.node.slab import NodeSlab
from lmc.cache.policy.registry import get_policy
from lmc.errors import ConfigError, NodeError
from tests.services import wait_until

MIB = 1 << 20


@given(
    st.integers(1, 64).map(lambda n: n * MIB),
    st.lists(st.integers(1, 3 * MIB), min_size=1, max_size=4),
    st.data(),
)
def test_slots_of_all_namespaces_never_meet(size: int, chunks: list[int], data: st.DataObject) -> None:
    extents = Extents(size)
    fit = [chunk for chunk in chunks if whole_pages(chunk) <= extents.count * extents.extent_bytes]
    spaces = [Places(extents, [chunk]) for chunk in fit]
    for _ in range(30):
        if not spaces:
            break
        places = data.draw(st.sampled_from(spaces))
        if places.held() and data.draw(st.booleans()):
            places.give_back(data.draw(st.sampled_from(places.held())))
        else:
            places.grow()
        taken = sorted(
            (one.offset(slot), one.stride) for one in spaces for index in one.held() for slot in one.slots_of(index)
        )
        assert all(end + stride <= after for (end, stride), (after, _) in pairwise(taken))
        assert not taken or taken[-1][0] + taken[-1][1] <= size
        held = sum(len(one.held()) * one.run for one in spaces)
        assert extents.num_free + held == extents.count


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 32))
def test_little_of_a_run_is_left_over(size: int, chunk: int) -> None:
    extents = Extents(max(size, MIB))
    stride = whole_pages(chunk)
    if stride > extents.count * extents.extent_bytes:
        with pytest.raises(ConfigError, match="less than one chunk"):
            extents.run_for(stride)
        return
    run = extents.run_for(stride)
    assert run == extents.count or run * extents.extent_bytes % stride * 8 <= run * extents.extent_bytes


def test_the_parts_of_ranks_lie_side_by_side() -> None:
    memory = Memory(MIB)
    places = Places(Extents(memory.size), [5000, 5000])
    assert places.stride == 4 * UNIT
    slots = places.grow()
    assert slots is not None
    views = [RankSlots(memory, places, rank, 5000) for rank in range(2)]
    for slot in slots:
        for rank, view in enumerate(views):
            view.view(slot)[:] = bytes([slot % 100 + 100 * rank]) * 5000
    for slot in slots:
        for rank, view in enumerate(views):
            assert bytes(view.view(slot)) == bytes([slot % 100 + 100 * rank]) * 5000
    memory.close()


def test_a_worker_sees_the_nodes_bytes_and_cannot_shrink_them() -> None:
    memory = Memory(MIB)
    mapping = map_memory(memory.descriptor, memory.size)
    memory.bytes[5] = 77
    assert mapping[5] == 77
    with pytest.raises(PermissionError):
        os.ftruncate(memory.descriptor, UNIT)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    mapping.close()
    memory.close()


class Driver:
    """Stands for a device's driver, which cannot exist here."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}

    def register(self, address: int, size: int) -> None:
        self.registered[address] = size

    def unregister(self, address: int) -> None:
        del self.registered[address]


def test_pinned_slots_are_counted_with_the_parts_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr("lmc.cache.node.slab.open_registrar", lambda device: (driver, None))
    memory, ranks = Memory(MIB), 4
    slab = NodeSlab(UNIT, "cuda:0")
    slab.map(memory.descriptor, memory.size, UNIT, UNIT, ranks * UNIT)
    wait_until(lambda: slab.pinned_slots > 0, "nothing was pinned")
    assert sum(driver.registered.values()) == MIB
    assert slab.pinned_slots == MIB // (ranks * UNIT)
    assert slab.unmap() and not driver.registered
    memory.close()


def test_what_is_no_such_memory_is_not_mapped() -> None:
    plain = os.memfd_create("plain", os.MFD_ALLOW_SEALING)
    os.ftruncate(plain, MIB)
    with pytest.raises(NodeError, match="not as it says"):
        map_memory(plain, MIB)
    os.close(plain)
    with Path(os.devnull).open() as other, pytest.raises(NodeError, match="cannot map"):
        map_memory(other.fileno(), MIB)


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="too small for a node"):
        Memory(1000)


# Slots that come and go


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(32, "little"))


@given(st.data())
def test_recalled_slots_are_never_given_out_and_come_free(data: st.DataObject) -> None:
    """Against any order of stores, loads, pins and recalls: nobody holds a slot that was recalled, once recall() has said 0."""
    runs, per_run = 4, 3
    directory = Directory(runs * per_run, {}, get_policy("lru"))
    directory.lending.withhold_all()
    here: set[int] = set()
    recalled: set[int] = set()
    tickets: list[Ticket] = []
    now = 0.0
    for step in range(40):
        now += 1
        action = data.draw(st.sampled_from(["give", "recall", "store", "load", "complete", "complete", "pin", "unpin"]))
        if action == "give" and (absent := sorted(set(range(runs)) - here - recalled)):
            run = data.draw(st.sampled_from(absent))
            directory.lending.give(range(run * per_run, (run + 1) * per_run))
            here.add(run)
        elif action == "recall" and (there := sorted(here | recalled)):
            run = data.draw(st.sampled_from(there))
            here.discard(run)
            recalled.add(run)
            slots = range(run * per_run, (run + 1) * per_run)
            if directory.lending.recall(slots) == 0:
                recalled.discard(run)
                assert not any(ticket.slot in slots for ticket in tickets)
        elif action == "store":
            prompt = data.draw(st.integers(0, 4))
            keys = [key(100 * prompt + index) for index in range(data.draw(st.integers(1, 4)))]
            new = directory.store(keys, now)
            assert all(ticket.slot // per_run in here for ticket in new)
            tickets += new
        elif action == "load":
            keys = [key(100 * data.draw(st.integers(0, 4)))]
            if directory.lookup(keys, now).num_chunks:
                tickets += directory.load(keys)
        elif action == "complete" and tickets:
            ticket = tickets.pop(data.draw(st.integers(0, len(tickets) - 1)))
            directory.complete(ticket.operation, data.draw(st.sampled_from([None, None, "copy"])), now)
        elif action == "pin":
            directory.pin([key(100 * data.draw(st.integers(0, 4)))], f"p{step % 3}", now + 1000)
        elif action == "unpin":
            directory.unpin(f"p{step % 3}")
        directory.check()
    for ticket in tickets:
        directory.complete(ticket.operation, None, now)
    for number in range(3):
        directory.unpin(f"p{number}")
    for run in here | recalled:
        assert directory.lending.recall(range(run * per_run, (run + 1) * per_run)) == 0
    directory.check()
    assert directory.usage()["host"] == (0, 0)


def test_a_recall_takes_what_continues_its_chunks_too() -> None:
    """A parent in the recalled slots, its child elsewhere: a child without its parent would be of no use."""
    directory = Directory(4, {}, get_policy("lru"))
    directory.lending.withhold_all()
    directory.lending.give(range(2))
    first = directory.store([key(1), key(2)], 0.0)
    directory.lending.give(range(2, 4))
    second = directory.store([key(1), key(2), key(3), key(4)], 1.0)
    for ticket in (*first, *second):
        directory.complete(ticket.operation, None, 1.0)
    slots = range(2) if first[0].slot < 2 else range(2, 4)
    assert directory.lending.recall(slots) == 0
    assert directory.lookup([key(1)], 2.0).num_chunks == 0
    directory.check()


def test_a_stretch_is_what_would_be_free_side_by_side() -> None:
    extents = Extents(MIB)
    taken = [extents.take(1) for _ in range(extents.count)]
    assert taken == list(range(16))
    extents.give_back(3, 1)
    extents.give_back(5, 1)
    extents.give_back(6, 1)
    assert [extents.stretch(first, 1) for first in (0, 2, 4, 7, 15)] == [1, 2, 4, 3, 1]
