"""Loads layer by layer, and what a forward pass learns of those that fail. Threads and lazy events stand for a device's streams."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lmc.cache.connectors.base import LocalCache
from lmc.cache.plan import BlockCopy, Plan, RequestCopies
from lmc.cache.transfer.backends.host import HostBackend
from lmc.cache.transfer.layout import KVLayout, Layer, Piece, Region
from lmc.cache.transfer.pinned import Slab
from lmc.cache.transfer.planner import Descriptors, Direction
from lmc.cache.transfer.runtimes import CallerStream, ThreadEvent, ThreadRuntime, ThreadStream
from lmc.cache.transfer.streams import Event, Stream, TransferStreams
from lmc.cache.worker import block_copies
from lmc.cache.worker.block_copies import BlockCopier
from lmc.cache.worker.worker import CacheWorker
from lmc.errors import TransferError
from tests.cache.instance import BLOCK_TOKENS, CHUNK_TOKENS, Instance, prompt, settings

LAYERS, BLOCKS, BLOCK_BYTES = 3, 8, 64


class Gated:
    """A backend that asks before each batch of copies."""

    name = "gated"

    def __init__(self) -> None:
        self._host = HostBackend()
        self.before: Callable[[int], None] = lambda turn: None
        self.turns = 0

    def refuses(self, descriptors: Descriptors) -> str:
        return ""

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        turn, self.turns = self.turns, self.turns + 1
        self.before(turn)
        self._host.execute(descriptors)


class World:
    """Blocks of LAYERS layers, slots that hold two blocks each, and copies between them on streams."""

    def __init__(self, runtime: ThreadRuntime, *, together: bool = False) -> None:
        self.runtime = runtime
        self.kv = np.zeros((LAYERS, BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        if together:
            self.kv = np.zeros((BLOCKS, LAYERS, BLOCK_BYTES), dtype=np.uint8).swapaxes(0, 1)
        self.slab = Slab(4, 2 * LAYERS * BLOCK_BYTES)
        self.backend = Gated()
        self.copier = BlockCopier(_layout(self.kv), self.slab, self.backend, TransferStreams(runtime, self.backend))
        for slot in range(4):
            self.slab.view(slot)[:] = bytes(range(slot, slot + 128)) * LAYERS

    def right(self, layer: int, blocks: list[int], slot: int) -> bool:
        parts = np.frombuffer(self.slab.view(slot), dtype=np.uint8).reshape(LAYERS, 2, BLOCK_BYTES)
        return bool((self.kv[layer, blocks] == parts[layer]).all())

    def close(self) -> None:
        self.copier.close()
        self.runtime.close()
        self.slab.close()


def _layout(kv: np.ndarray) -> KVLayout:
    layer_stride, block_stride, _ = kv.strides
    base = kv.ctypes.data
    layers = tuple(f"layer{layer}" for layer in range(LAYERS))
    if layer_stride < block_stride:
        regions = (Region(base, block_stride, LAYERS * BLOCK_BYTES),)
        pieces = [Piece(0, layer * BLOCK_BYTES, BLOCK_BYTES) for layer in range(LAYERS)]
    else:
        regions = tuple(Region(base + layer * layer_stride, block_stride, BLOCK_BYTES) for layer in range(LAYERS))
        pieces = [Piece(layer, 0, BLOCK_BYTES) for layer in range(LAYERS)]
    owners = tuple(Layer((name,), (piece,)) for name, piece in zip(layers, pieces, strict=True))
    return KVLayout("test", "cpu", 4, BLOCKS, regions, owners, "blocks of a test")


def load_of(name: str, operation: int, slot: int, blocks: tuple[int, ...]) -> RequestCopies:
    return RequestCopies(name, (BlockCopy(operation, bytes([operation]) * 32, slot, blocks),))


A, B = load_of("a", 1, 0, (5, 2)), load_of("b", 2, 3, (-1, 7))


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_copies, "LAYER_BYTES", 1)


@pytest.fixture
def world() -> Iterator[World]:
    world = World(ThreadRuntime())
    yield world
    world.close()


def test_a_layer_does_not_wait_for_the_next_one(world: World) -> None:
    """Of all requests of the pass: were they queued one after the other, a layer of the second would wait for all of the first."""
    turns = [threading.Event() for _ in range(LAYERS)]
    world.backend.before = lambda turn: turns[turn].wait(60) and None
    assert world.copier.start_layers([A, B])
    for layer in range(LAYERS):
        turns[layer].set()
        world.copier.wait_layer(f"layer{layer}")
        assert world.right(layer, [5, 2], 0)
        assert (
            world.kv[layer, 7] == np.frombuffer(world.slab.view(3), np.uint8).reshape(LAYERS, 2, -1)[layer, 1]
        ).all()
        assert layer == LAYERS - 1 or (world.kv[layer + 1] == 0).all(), "the next layer's turn has not come"
    assert world.copier.end_layers() == set()
    ended = world.copier.ended()
    assert [(one.request_id, one.operations, one.failed, one.num_bytes) for one in ended] == [
        ("a", (1,), False, 2 * LAYERS * BLOCK_BYTES),
        ("b", (2,), False, LAYERS * BLOCK_BYTES),
    ]
    assert ended[0].seconds == pytest.approx(2 * ended[1].seconds)
    assert (world.kv[:, [0, 1, 3, 4, 6]] == 0).all()


def test_a_failure_in_any_layer_fails_the_load(world: World) -> None:
    def fail(turn: int) -> None:
        if turn == 1:
            raise TransferError("the bus fell off")

    world.backend.before = fail
    assert world.copier.start_layers([A, B])
    for layer in range(LAYERS):
        world.copier.wait_layer(f"layer{layer}")
    assert world.copier.end_layers() == {5, 2, 7}
    assert world.copier.end_layers() == set()
    assert [one.failed for one in world.copier.ended()] == [True, True]


def test_a_pass_that_skips_a_wait_is_not_trusted_and_the_next_load_ends_before_the_pass(world: World) -> None:
    assert world.copier.start_layers([A])
    for layer in (0, 2):
        world.copier.wait_layer(f"layer{layer}")
    assert world.copier.end_layers() == {5, 2}
    assert not world.copier.start_layers([A])
    assert world.copier.load(A)
    assert all(world.right(layer, [5, 2], 0) for layer in range(LAYERS))


def test_what_cannot_be_planned_fails_and_nobody_waits(world: World) -> None:
    assert world.copier.start_layers([load_of("c", 3, 0, (BLOCKS, 1))])
    world.copier.wait_layer("layer0")
    assert world.copier.end_layers() == {BLOCKS, 1}
    assert [(one.operations, one.failed) for one in world.copier.ended()] == [((3,), True)]


def test_little_is_copied_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_copies, "LAYER_BYTES", 2 * BLOCK_BYTES + 1)
    assert not world.copier.start_layers([A])
    assert world.copier.start_layers([A, B])
    assert not BlockCopier(world.copier.layout, world.slab, world.backend).start_layers([A, B])


def test_blocks_that_hold_all_layers_are_copied_whole() -> None:
    world = World(ThreadRuntime(), together=True)
    assert not world.copier.start_layers([A, B])
    assert world.copier.load(A)
    world.close()


@pytest.mark.parametrize("on_streams", [True, False])
def test_while_the_engines_memory_is_away_no_copy_touches_it(world: World, on_streams: bool) -> None:
    copier = world.copier if on_streams else BlockCopier(_layout(world.kv), world.slab, world.backend)
    copy = copier.store if on_streams else copier.load_in_background  # what runs behind the caller's back
    world.kv[:] = 9
    begun, go = threading.Event(), threading.Event()

    def wait(turn: int) -> None:
        begun.set()
        assert go.wait(60)

    world.backend.before = wait
    copy(A)
    assert begun.wait(60)
    threading.Timer(0.2, go.set).start()
    copier.detach()
    world.kv[:] = 1  # somebody else's now
    assert [one.failed for one in copier.ended()] == [False]
    if on_streams:
        assert bytes(world.slab.view(0)) == bytes([9]) * len(world.slab.view(0))
    turns = world.backend.turns
    copier.store(A)
    copier.load_in_background(B)
    assert not copier.load(B)
    copier.detach()  # both hooks may come twice
    assert [one.failed for one in copier.ended()] == [True] * 3
    assert world.backend.turns == turns and (world.kv == 1).all()
    copier.attach()
    copier.attach()
    assert copier.load(load_of("c", 3, 1, (5, 2)))
    assert world.right(0, [5, 2], 1)
    copier.close()


def test_on_a_cpu_a_small_load_for_a_request_outside_the_batch_is_over_at_once(world: World) -> None:
    copier = BlockCopier(_layout(world.kv), world.slab, world.backend, on_thread_bytes=2 * LAYERS * BLOCK_BYTES)
    threads: list[threading.Thread] = []
    world.backend.before = lambda turn: threads.append(threading.current_thread())
    copier.load_in_background(B)  # one block
    assert [(one.operations, one.background, one.failed) for one in copier.ended()] == [((2,), True, False)]
    assert threads == [threading.current_thread()]
    copier.load_in_background(A)  # two blocks
    copier.close()
    assert [one.operations for one in copier.ended()] == [(1,)]
    assert len(threads) == 2 and threads[1] is not threads[0]
    assert world.right(0, [5, 2], 0)


@pytest.mark.parametrize("on_streams", [False, True])
def test_layers_arrive_one_by_one_on_a_thread_of_the_callers(world: World, on_streams: bool) -> None:
    copier = world.copier if on_streams else BlockCopier(world.copier.layout, world.slab, world.backend)
    seen: list[tuple[int, list[bool]]] = []
    assert copier.load_each_layer(
        [A], lambda layer: seen.append((layer, [world.right(n, [5, 2], 0) for n in range(3)]))
    )
    assert seen == [(0, [True, False, False]), (1, [True, True, False]), (2, [True, True, True])]

    def fail(layer: int) -> None:
        raise ZeroDivisionError("injected")

    assert not copier.load_each_layer([B], fail)
    assert [(one.operations, one.failed) for one in copier.ended()] == [((1,), False), ((2,), True)]


class LateEvent(ThreadEvent):
    """Of a device that is behind: nothing has happened yet when the host asks."""

    over = False

    def query(self) -> bool:
        return LateEvent.over


class LateStream(CallerStream):
    def record(self) -> Event:
        event = LateEvent()
        event.set()
        return event


class LateRuntime(ThreadRuntime):
    def new_stream(self) -> Stream:
        return LateStream()

    def compute_stream(self) -> Stream:
        return LateStream()


@pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "by layer"])
def test_a_failed_load_is_known_in_its_own_step_and_told_once(by_layer: bool) -> None:
    """vLLM trusts the pass unless it hears of bad blocks in the same step; told again later, they may be another request's."""
    world = World(LateRuntime())
    world.backend.before = lambda turn: _fall_off()
    instance = Instance(settings())
    worker: CacheWorker = instance.workers[0]
    worker.copier = world.copier
    LateEvent.over = False
    worker.begin(Plan(loads=[A]), by_layer=by_layer)
    for layer in range(LAYERS):
        worker.wait_layer(f"layer{layer}")
    worker.end(Plan(stores=[load_of("a", 9, 1, (5, 2))]))
    assert worker.take_loaded() == set()
    assert worker.take_failed_blocks() == {5, 2}
    report = worker.take_report()
    assert report.faults == {0: 1}
    assert report.finished == {9: 1} and report.failed == {9: "copy"}, (
        "the store of that pass is dropped; the load is under way"
    )
    LateEvent.over = True
    assert worker.take_failed_blocks() == set()
    report = worker.take_report()
    assert report.finished == {1: 1} and report.failed == {1: "copy"}
    world.close()
    instance.close()


def _fall_off() -> None:
    raise TransferError("the bus fell off")


def test_loads_by_layer_serve_the_right_bytes_and_survive_failures() -> None:
    instance = Instance(settings(), 2, streams=True, by_layer=True)
    tokens = prompt(1, 50)
    instance.serve(tokens)
    assert instance.serve(tokens).loaded == 48
    backend = instance.workers[1].copier.backend
    execute, failures = backend.execute, [1]

    def break_once(descriptors: Descriptors, stream: int = 0) -> None:
        if descriptors.direction is Direction.LOAD and failures:
            failures.pop()
            raise TransferError("injected")
        execute(descriptors, stream)

    instance.workers[1].copier._streams._backend.execute = break_once
    assert instance.serve(tokens).loaded == 0
    assert instance.serve(tokens).loaded == 48
    assert instance.metric("failures_total", operation="load") == 6
    instance.close()


class AsyncRuntime(ThreadRuntime):
    """Compute runs behind the caller too, as on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.compute = ThreadStream("compute")

    def compute_stream(self) -> Stream:
        return self.compute

    def close(self) -> None:
        self.compute.close()
        super().close()


def test_a_step_waits_only_for_stores_of_blocks_that_it_overwrites() -> None:
    """vLLM calls for the fence in every step: a store whose blocks nobody gets must go on beside the next pass."""
    runtime = AsyncRuntime()
    world = World(runtime)
    gate, passes = threading.Event(), [threading.Event() for _ in range(3)]
    world.backend.before = lambda turn: gate.wait(60) and None
    world.kv[:, [5, 2]] = 7
    world.copier.store(A)
    for number, overwritten in enumerate([{0, 1, 7}, set(), {2}]):
        world.copier.fence(overwritten)
        runtime.compute.run(lambda _, number=number: passes[number].set())
    assert passes[1].wait(60), "it waited for a store of other blocks"
    assert not world.copier.ended()
    assert not passes[2].is_set(), "block 2 was overwritten while the store reads it"
    gate.set()
    assert passes[2].wait(60)
    world.close()
    assert (np.frombuffer(world.slab.view(0), np.uint8) == 7).all()


STEPS = st.lists(st.tuples(st.sampled_from(["store", "overwrite", "drain"]), st.integers(0, BLOCKS - 2)), max_size=12)


@hypothesis_settings(deadline=None, max_examples=60)
@given(STEPS, st.integers(0, 1000), st.booleans())
def test_whatever_is_handed_out_again_a_store_has_the_bytes_of_its_step(
    steps: list[tuple[str, int]], seed: int, any_block: bool
) -> None:
    pauses = random.Random(seed)
    runtime = AsyncRuntime()
    world = World(runtime)
    world.backend.before = lambda turn: time.sleep(pauses.choice([0, 0, 0.001, 0.003]))
    expected: dict[int, np.ndarray] = {}
    now = np.zeros_like(world.kv)
    for number, (kind, first) in enumerate(steps, start=1):
        blocks = (first, first + 1)
        if kind == "drain":
            world.copier.drain()
            runtime.compute.run(lambda _, number=number: world.kv.fill(number))  # nobody asks for a fence
            now.fill(number)
        elif kind == "overwrite":
            world.copier.fence(None if any_block else set(blocks))
            runtime.compute.run(lambda _, b=blocks, number=number: _fill(world.kv, b, number))
            _fill(now, blocks, number)
        else:
            slot = number % 4
            world.copier.store(load_of(str(number), number, slot, blocks))
            expected[slot] = now[:, list(blocks)].copy()
    world.copier.drain()
    assert len(world.copier.ended()) == sum(kind == "store" for kind, _ in steps)
    world.close()
    for slot, parts in expected.items():
        assert (np.frombuffer(world.slab.view(slot), np.uint8).reshape(LAYERS, 2, -1) == parts).all()


def _fill(kv: np.ndarray, blocks: tuple[int, ...], value: int) -> None:
    kv[:, list(blocks)] = value


def test_an_engine_in_one_process_may_write_its_blocks_after_load() -> None:
    """The next prompt's pass overwrites blocks that the store of the last one is still reading."""
    instance = Instance(settings(), streams=True)
    blocks, kv, rank = list(range(6)), instance.kv[0], instance.workers[0]
    cache = LocalCache.__new__(LocalCache)
    cache.worker, cache.scheduler = rank, instance.scheduler
    first, second = prompt(1, 24), prompt(2, 24)
    assert cache.lookup("first", first) == 0 and cache.load("first", 0, blocks)
    kv[:, blocks] = 0x11
    cache.store("first", first, 24, blocks)
    assert cache.lookup("second", second) == 0 and cache.load("second", 0, blocks)
    kv[:, blocks] = 0xEE
    cache.finish("first")
    cache.finish("second")
    assert cache.settle()
    gain = cache.lookup("again", first)
    assert gain >= CHUNK_TOKENS and cache.load("again", gain, blocks)
    assert (kv[:, blocks[: gain // BLOCK_TOKENS]] == 0x11).all()
    cache.finish("again")
    instance.close()
