"""Order of copies and compute. Streams are threads here; test_gpu runs the same scenarios on CUDA streams."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.transfer.backends.host import HostBackend
from lmc.cache.transfer.planner import Descriptors, Direction
from lmc.cache.transfer.runtimes import CudaRuntime, ThreadRuntime, ThreadStream
from lmc.cache.transfer.streams import Event, Stream, TransferStreams
from lmc.errors import TransferError
from tests.cache.transfer.fake_driver import GLOBAL, RELAXED, fake_driver

CELL = 16  # bytes of a block and of a slot


class AsyncRuntime(ThreadRuntime):
    """Compute runs behind the caller too, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.compute = ThreadStream("compute")

    def compute_stream(self) -> Stream:
        return self.compute

    def close(self) -> None:
        self.compute.close()
        super().close()


class SlowBackend:
    """Copies after a pause, so that a missing wait shows."""

    name = "slow"

    def __init__(self, pause: Callable[[], float] = lambda: 0.0) -> None:
        self._host = HostBackend()
        self._pause = pause
        self.failing = False

    def refuses(self, descriptors: Descriptors) -> str:
        return ""

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        time.sleep(self._pause())
        if self.failing:
            raise TransferError("the bus fell off")
        self._host.execute(descriptors, stream)


class World:
    """A few blocks and slots, and the copies between them."""

    def __init__(self, pause: Callable[[], float] = lambda: 0.0) -> None:
        self.blocks = np.zeros((4, CELL), dtype=np.uint8)
        self.slots = np.zeros((4, CELL), dtype=np.uint8)
        self.runtime = AsyncRuntime()
        self.backend = SlowBackend(pause)
        self.streams = TransferStreams(self.runtime, self.backend)

    def copies(self, direction: Direction, block: int, slot: int) -> Descriptors:
        block_at, slot_at = (
            np.array([array[index].ctypes.data], dtype=np.uint64)
            for array, index in ((self.blocks, block), (self.slots, slot))
        )
        size = np.array([CELL], dtype=np.uint64)
        pair = (block_at, slot_at) if direction is Direction.STORE else (slot_at, block_at)
        return Descriptors(*pair, size, direction)

    def compute(self, work: Callable[[], None]) -> None:
        self.runtime.compute.run(lambda handle: work())

    def close(self) -> None:
        self.streams.drain()
        self.runtime.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def test_a_store_waits_for_the_step_that_writes_the_block(world: World) -> None:
    gate = threading.Event()
    world.compute(lambda: (gate.wait(60), world.blocks[1].fill(7)))
    store = world.streams.submit(world.copies(Direction.STORE, 1, 2))
    time.sleep(0.02)
    assert not store.ended.query()
    gate.set()
    world.streams.drain()
    assert (world.slots[2] == 7).all()


def test_a_load_waits_for_the_step_that_reads_the_block(world: World) -> None:
    """A reallocated block may still be read by the step before: loading early garbles that step."""
    gate, seen = threading.Event(), []
    world.blocks[1].fill(3)
    world.slots[2].fill(9)
    world.compute(lambda: (gate.wait(60), seen.append(world.blocks[1].copy())))
    world.streams.submit(world.copies(Direction.LOAD, 1, 2))
    time.sleep(0.02)
    gate.set()
    world.streams.drain()
    assert (seen[0] == 3).all()
    assert (world.blocks[1] == 9).all()


def test_compute_waits_for_the_load_it_was_told_of() -> None:
    world = World(pause=lambda: 0.03)
    seen: list[int] = []
    world.slots[0].fill(5)
    load = world.streams.submit(world.copies(Direction.LOAD, 3, 0))
    world.streams.wait(load)
    world.compute(lambda: seen.append(int(world.blocks[3, 0])))
    world.close()
    assert seen == [5]


def test_drained_streams_touch_nothing_any_more() -> None:
    """Blocks are freed and written again while stores of two steps are under way."""
    world = World(pause=lambda: 0.02)
    for block in (0, 1):
        world.compute(lambda block=block: world.blocks[block].fill(block + 1))
        world.streams.submit(world.copies(Direction.STORE, block, block))
    assert [transfer.error for transfer in world.streams.drain()] == [None, None]
    world.compute(lambda: world.blocks.fill(9))
    world.close()
    assert world.slots[:2, 0].tolist() == [1, 2]


def test_a_thread_of_lmcs_copies_beside_a_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, library = fake_driver()
    monkeypatch.setattr("lmc.cache.transfer.cuda.load_driver", lambda: driver)
    seen: list[int] = []

    def work() -> None:
        CudaRuntime("cuda:0").own_thread()
        seen.append(library.mode_of_this_thread)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [RELAXED]
    assert library.mode_of_this_thread == GLOBAL


def test_layers_are_released_one_by_one() -> None:
    world = World()
    turns = [threading.Event(), threading.Event()]
    arrivals = iter(turns)
    world.backend._pause = lambda: next(arrivals).wait(60) * 0.0
    world.slots[0].fill(5)
    world.slots[1].fill(6)
    parts = [world.copies(Direction.LOAD, 0, 0), world.copies(Direction.LOAD, 1, 1)]
    load = world.streams.submit_layers(parts, tag="request")
    seen: list[int] = []
    first_done = threading.Event()
    world.streams.wait_layer(load, 0)
    world.compute(lambda: (seen.append(int(world.blocks[0, 0])), first_done.set()))
    world.streams.wait_layer(load, 1)
    world.compute(lambda: seen.append(int(world.blocks[1, 0])))
    turns[0].set()
    assert first_done.wait(60)
    assert seen == [5]
    assert world.streams.finished() == []
    turns[1].set()
    assert [transfer.tag for transfer in world.streams.drain()] == ["request"]
    world.close()
    assert seen == [5, 6]
    assert load.descriptors.num_bytes == 2 * CELL


def test_stores_cannot_be_waited_for_by_layer(world: World) -> None:
    with pytest.raises(TransferError, match="only loads"):
        world.streams.submit_layers([world.copies(Direction.STORE, 0, 0)])


def test_nothing_is_finished_before_its_event() -> None:
    release = threading.Event()
    world = World(pause=lambda: release.wait(60) * 0.0)
    store = world.streams.submit(world.copies(Direction.STORE, 0, 0), tag=[0])
    assert world.streams.finished() == []
    release.set()
    assert world.streams.drain() == [store]
    assert world.streams.finished() == []
    assert store.seconds >= 0
    world.close()


def test_a_failure_belongs_to_its_transfer(world: World) -> None:
    world.blocks[0].fill(1)
    good = world.streams.submit(world.copies(Direction.STORE, 0, 0))
    good.ended.synchronize()
    world.backend.failing = True
    bad = world.streams.submit(world.copies(Direction.STORE, 1, 1))
    bad.ended.synchronize()
    world.backend.failing = False
    later = world.streams.submit(world.copies(Direction.STORE, 0, 2))
    assert world.streams.drain() == [good, bad, later]
    assert [str(transfer.error) for transfer in (good, bad, later)] == ["None", "the bus fell off", "None"]
    assert (world.slots[2] == 1).all()


@pytest.mark.parametrize("first", list(Direction))
def test_what_a_pending_transfer_reads_is_not_overwritten(first: Direction) -> None:
    """A slot reused while it is loaded from, a block loaded into while it is stored from."""
    release = threading.Event()
    pauses = iter([lambda: release.wait(60), lambda: True])
    world = World(pause=lambda: next(pauses)() * 0.0)
    second = Direction.LOAD if first is Direction.STORE else Direction.STORE
    source, target = (world.blocks, world.slots) if first is Direction.STORE else (world.slots, world.blocks)
    source[0].fill(1)
    target[1].fill(2)
    world.streams.submit(world.copies(first, 0, 0))
    pair = (0, 1) if first is Direction.STORE else (1, 0)
    later = world.streams.submit(world.copies(second, *pair))  # writes what the first one reads
    time.sleep(0.02)
    assert not later.ended.query()
    release.set()
    world.close()
    assert (target[0] == 1).all()
    assert (source[0] == 2).all()


def test_a_load_of_a_slot_that_is_being_stored_is_submitted_only_when_it_is_whole() -> None:
    """A wait on the stream is not enough: the copy engine is told that it may read slots out of the stream's order."""
    release = threading.Event()
    pauses = iter([lambda: release.wait(60), lambda: True])
    world = World(pause=lambda: next(pauses)() * 0.0)
    world.blocks[0].fill(1)
    store = world.streams.submit(world.copies(Direction.STORE, 0, 0))
    threading.Timer(0.05, release.set).start()
    world.streams.submit(world.copies(Direction.LOAD, 1, 0))
    assert store.ended.query()
    world.close()
    assert (world.blocks[1] == 1).all()


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["write", "read", "store", "load"]), st.integers(0, 2), st.integers(0, 1)), max_size=14
)


@settings(deadline=None, max_examples=100)
@given(OPERATIONS, st.integers(0, 1000))
def test_any_order_of_submissions_gives_the_bytes_of_that_order(
    operations: list[tuple[str, int, int]], seed: int
) -> None:
    """Blocks reallocated and slots reused at once: whatever the streams do, the result is that of one operation after the other."""
    pauses = random.Random(seed)
    world = World(pause=lambda: pauses.choice([0, 0, 0.001, 0.003]))
    blocks, slots = np.zeros((4, CELL), dtype=np.uint8), np.zeros((4, CELL), dtype=np.uint8)
    seen: list[int] = []
    expected: list[int] = []
    pending_loads: dict[int, Event] = {}
    for number, (kind, block, slot) in enumerate(operations, start=1):
        if kind in ("write", "read") and block in pending_loads:
            # The engine launches work on a block only after its load: it polls finished() or waits on the stream.
            world.runtime.compute.wait_for(pending_loads.pop(block))
        if kind == "write":
            world.streams.drain()  # a block that a store reads belongs to the store until it is finished
            world.compute(lambda block=block, number=number: world.blocks[block].fill(number))
            blocks[block].fill(number)
        elif kind == "read":
            world.compute(lambda block=block: seen.append(int(world.blocks[block, 0])))
            expected.append(int(blocks[block, 0]))
        elif kind == "store":
            world.streams.submit(world.copies(Direction.STORE, block, slot))
            slots[slot] = blocks[block]
        else:
            load = world.streams.submit(world.copies(Direction.LOAD, block, slot))
            pending_loads[block] = load.ended
            blocks[block] = slots[slot]
    world.close()
    assert np.array_equal(world.blocks, blocks)
    assert np.array_equal(world.slots, slots)
    assert seen == expected


def test_on_the_cpu_the_callers_own_work_needs_no_wait() -> None:
    runtime = ThreadRuntime()
    streams = TransferStreams(runtime, HostBackend())
    source, target = np.arange(64, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    columns = (np.array([value], dtype=np.uint64) for value in (source.ctypes.data, target.ctypes.data, 64))
    transfer = streams.submit(Descriptors(*columns, Direction.STORE))
    streams.wait(transfer)  # on the CPU the caller itself waits
    assert np.array_equal(source, target)
    runtime.close()
