from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.plan import SKIP
from lmc.cache.transfer.backends.host import HostBackend
from lmc.cache.transfer.layout import KVLayout, Layer, Piece, Region
from lmc.cache.transfer.planner import Descriptors, Direction, fragment, plan, plan_layers, slot_bytes
from lmc.errors import TransferError
from tests.contracts.transfer import Engine, Slots, block_tables, check_backend, engines, sglang_engine, vllm_engine


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, dtype=np.int64)


def flat(table: list[list[int]]) -> np.ndarray:
    return np.array(table, dtype=np.int64).ravel()


def at(*addresses: int) -> np.ndarray:
    return np.array(addresses, dtype=np.uint64)


def spans(starts: np.ndarray, sizes: np.ndarray) -> list[tuple[int, int]]:
    return sorted((int(start), int(start + size)) for start, size in zip(starts, sizes, strict=True))


@settings(deadline=None)
@given(st.data(), st.sampled_from(list(Direction)))
def test_descriptors_are_disjoint_and_inside(data: st.DataObject, direction: Direction) -> None:
    engine = data.draw(engines())
    table = data.draw(block_tables(engine.layout.num_blocks))
    slots = Slots(len(table), slot_bytes(engine.layout, len(table[0])), 0)
    copies = plan(engine.layout, flat(table), slots.addresses, direction)
    for starts, allowed in (
        (copies.slots, [(int(address), int(address) + slots.size) for address in slots.addresses]),
        (copies.blocks, [(memory.data_ptr(), memory.data_ptr() + memory.numel()) for memory in engine.memory]),
    ):
        pieces = spans(starts, copies.size)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(pieces))
        assert all(any(low <= start and stop <= high for low, high in allowed) for start, stop in pieces)
    taking_part = sum(block >= 0 for chunk in table for block in chunk)
    assert copies.num_bytes == taking_part * engine.layout.block_bytes
    assert (copies.size > 0).all()


@settings(deadline=None)
@given(st.data(), st.sampled_from(list(Direction)))
def test_no_two_neighbours_could_be_one(data: st.DataObject, direction: Direction) -> None:
    engine = data.draw(engines())
    table = data.draw(block_tables(engine.layout.num_blocks))
    slots = Slots(len(table), slot_bytes(engine.layout, len(table[0])), 0)
    copies = plan(engine.layout, flat(table), slots.addresses, direction)
    follows = (copies.src[1:] == copies.src[:-1] + copies.size[:-1]) & (
        copies.dst[1:] == copies.dst[:-1] + copies.size[:-1]
    )
    assert not follows.any()


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (vllm_engine("LBHNC", torch.float16, layers=3), 3),  # one run per layer
        (vllm_engine("LHBNC", torch.float16, layers=3, heads=2), 6),
        (vllm_engine("BLHNC", torch.float16, layers=3), 1),
        (vllm_engine("BHLNC", torch.float16, layers=3), 1),
        (vllm_engine("LBNHC", torch.float16, layers=3, pad=16), 12),  # padding keeps blocks apart
        (sglang_engine(torch.float16, layers=3), 6),
        (sglang_engine(torch.float16, layers=3, mla=True), 3),
    ],
)
def test_consecutive_blocks_merge(engine: Engine, expected: int) -> None:
    slot = at(1 << 20)
    assert len(plan(engine.layout, ids(2, 3, 4, 5), slot, Direction.STORE)) == expected
    scattered = plan(engine.layout, ids(5, 3, 1, 6), slot, Direction.STORE)
    assert len(scattered) == 4 * len(engine.layout.regions)


@settings(deadline=None)
@given(st.data(), st.integers(0, 2**16))
def test_layers_one_by_one_are_the_whole_load(data: st.DataObject, seed: int) -> None:
    """Layer-wise loads leave the same bytes as a load of all layers, and each brings its own layer only."""
    engine = data.draw(engines())
    table = data.draw(block_tables(engine.layout.num_blocks))
    blocks = flat(table)
    slots = Slots(len(table), slot_bytes(engine.layout, len(table[0])), seed)
    engine.fill(seed)
    HostBackend().execute(plan(engine.layout, blocks, slots.addresses, Direction.LOAD))
    whole = engine.bytes()
    engine.fill(seed)
    num_layers = len(engine.layout.layers)
    taking_part = int((blocks >= 0).sum())
    for layer in data.draw(st.permutations(range(num_layers))):
        copies = plan(engine.layout, blocks, slots.addresses, Direction.LOAD, layers=range(layer, layer + 1))
        owned = sum(size for _, _, size in engine.layer_parts[layer])
        assert copies.num_bytes == owned * taking_part
        before = engine.blocks()
        before = [part.copy() for part in before]
        HostBackend().execute(copies)
        for part, (now, was) in enumerate(zip(engine.blocks(), before, strict=True)):
            touched = np.zeros(now.shape[1], dtype=bool)
            for owner, offset, size in engine.layer_parts[layer]:
                if owner == part:
                    touched[offset : offset + size] = True
            assert np.array_equal(now[:, ~touched], was[:, ~touched])
    assert all(np.array_equal(now, was) for now, was in zip(engine.bytes(), whole, strict=True))


@settings(deadline=None)
@given(st.data())
def test_all_layers_merge_as_the_whole_does(data: st.DataObject) -> None:
    engine = data.draw(engines())
    table = data.draw(block_tables(engine.layout.num_blocks))
    slots = Slots(len(table), slot_bytes(engine.layout, len(table[0])), 0)
    layers = range(len(engine.layout.layers))
    whole, layered = (
        plan(engine.layout, flat(table), slots.addresses, Direction.LOAD, layers=which) for which in (None, layers)
    )
    assert np.array_equal(whole.src, layered.src)
    assert np.array_equal(whole.dst, layered.dst)
    assert np.array_equal(whole.size, layered.size)


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(Direction))
def test_all_layers_planned_at_once_are_each_layers_plan(data: st.DataObject, direction: Direction) -> None:
    engine = data.draw(engines())
    table = data.draw(block_tables(engine.layout.num_blocks))
    blocks, slots = flat(table), Slots(len(table), slot_bytes(engine.layout, len(table[0])), 1)
    inside = st.integers(0, int(slots.addresses.max() - slots.addresses.min()))
    offsets = np.array(data.draw(st.lists(inside, max_size=4, unique=True)), dtype=np.uint64)
    edges = np.sort(slots.addresses.min() + offsets)
    together = plan_layers(engine.layout, blocks, slots.addresses, direction, boundaries=edges)
    assert len(together) == len(engine.layout.layers)
    for layer, found in enumerate(together):
        alone = plan(
            engine.layout, blocks, slots.addresses, direction, layers=range(layer, layer + 1), boundaries=edges
        )
        assert found.direction is direction
        for name in ("src", "dst", "size"):
            assert np.array_equal(getattr(found, name), getattr(alone, name))


def test_layers_of_unlike_pieces_and_bad_tables_are_planned_or_refused_as_one_by_one() -> None:
    size = 64
    regions = tuple(Region(4096 * index, size, size) for index in range(3))
    layers = (Layer(("a",), (Piece(0, 0, size), Piece(1, 0, size))), Layer(("b",), (Piece(2, 0, size),)))
    layout = KVLayout("test", "cpu", 4, 8, regions, layers, "unlike")
    slot = np.array([1 << 20], dtype=np.uint64)
    found = plan_layers(layout, ids(3, 1), slot, Direction.LOAD)
    assert [part.num_bytes for part in found] == [4 * size, 2 * size]
    with pytest.raises(TransferError, match="block 8 does not exist"):
        plan_layers(vllm_engine("LBHNC", torch.uint8).layout, ids(8, 1), slot, Direction.LOAD)
    assert [len(part) for part in plan_layers(layout, ids(), slot[:0], Direction.LOAD)] == [0, 0]


@settings(deadline=None)
@given(st.data(), st.integers(0, 2**16))
def test_copies_are_cut_at_boundaries(data: st.DataObject, seed: int) -> None:
    engine = data.draw(engines())
    table = data.draw(block_tables(engine.layout.num_blocks))
    total = 64 + len(table) * (slot_bytes(engine.layout, len(table[0])) + 64)
    offsets = data.draw(st.lists(st.integers(0, total), max_size=6, unique=True))

    def with_boundaries(layout: object, blocks: np.ndarray, slots: np.ndarray, direction: Direction) -> Descriptors:
        boundaries = np.sort(slots.min() + np.array(offsets, dtype=np.uint64))
        copies = plan(engine.layout, blocks, slots, direction, boundaries=boundaries)
        ends = copies.slots + copies.size
        for boundary in boundaries:
            assert not ((copies.slots < boundary) & (boundary < ends)).any()
        assert copies.num_bytes == plan(engine.layout, blocks, slots, direction).num_bytes
        assert (copies.size > 0).all()
        return copies

    check_backend(HostBackend(), engine, table, seed, plan_descriptors=with_boundaries)


def test_a_boundary_cuts_only_what_crosses_it() -> None:
    engine = vllm_engine("LBHNC", torch.uint8, layers=2, heads=1, tokens=4, content=4)  # 16 bytes per block and layer
    copies = plan(engine.layout, ids(0, 1), at(1000), Direction.STORE, boundaries=at(1000, 1008, 1020, 1032, 1064))
    assert copies.dst.tolist() == [1000, 1008, 1020, 1032]
    assert copies.size.tolist() == [8, 12, 12, 32]
    assert (copies.src - copies.src[0]).tolist()[:3] == [0, 8, 20]


@settings(deadline=None)
@given(st.data(), st.sampled_from([1, 7, 64, 1000]), st.integers(0, 2**16))
def test_fragments_copy_the_same_bytes(data: st.DataObject, limit: int, seed: int) -> None:
    engine = data.draw(engines())

    def fragmented(layout: object, blocks: np.ndarray, slots: np.ndarray, direction: Direction) -> Descriptors:
        copies = fragment(plan(engine.layout, blocks, slots, direction), limit)
        assert (copies.size > 0).all() and (copies.size <= limit).all()
        return copies

    table = data.draw(block_tables(engine.layout.num_blocks))
    check_backend(HostBackend(), engine, table, seed, plan_descriptors=fragmented)


def test_skipped_blocks_take_no_part() -> None:
    layout = vllm_engine("BLHNC", torch.float16).layout
    copies = plan(layout, ids(SKIP, 3, SKIP, SKIP), at(1 << 20, 1 << 21), Direction.LOAD)
    assert copies.src.tolist() == [(1 << 20) + layout.block_bytes]
    assert copies.dst.tolist() == [layout.ranges(3)[0][0]]
    assert len(plan(layout, ids(SKIP, SKIP), at(1 << 20), Direction.LOAD)) == 0


def test_nothing_is_planned_for_no_chunks() -> None:
    layout = vllm_engine("LBHNC", torch.float16).layout
    assert len(plan(layout, ids(), at(), Direction.STORE)) == 0


@pytest.mark.parametrize(
    ("blocks", "slots", "direction", "message"),
    [
        (ids(0, 1, 2), at(1 << 20, 2 << 20), Direction.STORE, "3 blocks do not fill 2 chunks"),
        (ids(0, 1), at(), Direction.STORE, "2 blocks do not fill 0 chunks"),
        (ids(), at(1 << 20), Direction.STORE, "a chunk has no blocks"),
        (ids(0, 7), at(1 << 20), Direction.STORE, "block 7 does not exist; the KV cache has 7 blocks"),
        (ids(0, -2), at(1 << 20), Direction.LOAD, "block -2 does not exist"),
        (ids(3, 3), at(1 << 20), Direction.LOAD, "a block is the destination of two loads"),
        (ids(0, 1), at(1 << 20, 1 << 20), Direction.STORE, "two chunks would be stored into one slot"),
        (ids(0, 1), at(1 << 20, (1 << 20) + 8), Direction.STORE, "two chunks would be stored into one slot"),
    ],
)
def test_what_would_corrupt_is_refused(
    blocks: np.ndarray, slots: np.ndarray, direction: Direction, message: str
) -> None:
    layout = vllm_engine("LBHNC", torch.float16).layout
    with pytest.raises(TransferError, match=message):
        plan(layout, blocks, slots, direction)


def test_one_block_may_be_stored_twice_and_one_slot_loaded_twice() -> None:
    layout = vllm_engine("BLHNC", torch.float16).layout
    assert len(plan(layout, ids(3, 3), at(1 << 20, 1 << 21), Direction.STORE)) == 2
    assert len(plan(layout, ids(3, 4), at(1 << 20, 1 << 20), Direction.LOAD)) == 2


def test_planning_reads_no_memory() -> None:
    """Addresses of a device that is not here: nothing may be dereferenced."""
    engine = vllm_engine("LBHNC", torch.float16)
    regions = tuple(dataclasses.replace(region, base=1 << 46) for region in engine.layout.regions[:1])
    layout = dataclasses.replace(engine.layout, device="cuda:0", regions=regions)
    assert plan(layout, ids(1), at(1 << 40), Direction.STORE).src.tolist() == [(1 << 46) + regions[0].stride]
