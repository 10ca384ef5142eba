"""What only a GPU can tell: bytes, order and speed on real streams. Skipped, with the reason, where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

from lmc.cache.transfer.backends.base import Backend
from lmc.cache.transfer.backends.device import device_backends
from lmc.cache.transfer.backends.reference import TorchBackend
from lmc.cache.transfer.cuda import load_driver
from lmc.cache.transfer.pinned import Slab, open_slab
from lmc.cache.transfer.planner import Descriptors, Direction
from lmc.cache.transfer.runtimes import CudaRuntime, run_now
from lmc.cache.transfer.streams import TransferStreams
from lmc.errors import TransferError
from lmc.probe.transfer import probe_cuda
from tests.contracts.transfer import DTYPES, ORDERS, check_backend, sglang_engine, vllm_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

DEVICE = "cuda:0"
NAMES = ("dma", "kernel", "staged", "torch")
TABLES = ([[3, 1], [0, 6]], [[0, 1], [2, 3]], [[5, -1]])


class Now:
    """A backend whose call returns when the bytes are in place."""

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self._backend = backend
        self._runtime = CudaRuntime(DEVICE)

    def refuses(self, descriptors: Descriptors) -> str:
        return self._backend.refuses(descriptors)

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        run_now(self._runtime, partial(self._backend.execute, descriptors))


@pytest.fixture(scope="module")
def backends() -> dict[str, Backend]:
    return {**device_backends(DEVICE, lambda addresses: True, load_driver()), "torch": TorchBackend(DEVICE)}


@pytest.fixture
def slab() -> Iterator[Slab]:
    slab = open_slab(DEVICE, 16, 1 << 20)
    assert slab.wait(timeout=60)
    assert slab.pinned_slots == 16, slab.problem
    yield slab
    slab.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [*ORDERS, "sglang", "sglang-mla"])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_round_trips(backends: dict[str, Backend], name: str, order: str, dtype: torch.dtype) -> None:
    for seed, table in enumerate(TABLES):
        if order.startswith("sglang"):
            engine = sglang_engine(dtype, mla=order == "sglang-mla", dim=16, device=DEVICE)
        else:
            engine = vllm_engine(order, dtype, content=16, device=DEVICE)
        check_backend(Now(backends[name]), engine, table, seed)


def copies(device: torch.Tensor, slab: Slab, direction: Direction, piece: int) -> Descriptors:
    """All of the tensor, in scattered pieces, to or from the slab's first slots."""
    count = device.numel() // piece
    places = np.random.default_rng(1).permutation(count).astype(np.uint64) * np.uint64(piece)
    engine = np.uint64(device.data_ptr()) + places
    slot = np.uint64(slab.address(0)) + np.arange(count, dtype=np.uint64) * np.uint64(piece)
    pair = (engine, slot) if direction is Direction.STORE else (slot, engine)
    return Descriptors(*pair, np.full(count, piece, dtype=np.uint64), direction)


@pytest.mark.parametrize("name", ["dma", "kernel", "staged"])
def test_a_store_sees_the_step_and_the_next_step_waits_for_its_end(
    backends: dict[str, Backend], slab: Slab, name: str
) -> None:
    """Compute writes the blocks right before and, once they are released, right after: no mixture may reach the slots."""
    blocks = torch.zeros(8 << 20, dtype=torch.uint8, device=DEVICE)
    busy = torch.randn(4096, 4096, device=DEVICE)
    streams = TransferStreams(CudaRuntime(DEVICE), backends[name])
    for step in range(1, 30):
        for _ in range(3):
            busy = (busy @ busy).clamp_(-1, 1)
        blocks.fill_(step)
        store = streams.submit(copies(blocks, slab, Direction.STORE, 8 << 10))
        streams.wait(store)
        blocks.fill_(0)
        assert streams.drain() == [store]
        assert store.error is None
        for slot in range(8):
            assert (np.frombuffer(slab.view(slot), dtype=np.uint8) == step).all()


@pytest.mark.parametrize("name", ["dma", "kernel", "staged"])
def test_a_load_waits_for_the_step_that_reads(backends: dict[str, Backend], slab: Slab, name: str) -> None:
    """Blocks given to another request while the step before still reads them."""
    blocks = torch.zeros(8 << 20, dtype=torch.uint8, device=DEVICE)
    busy = torch.randn(4096, 4096, device=DEVICE)
    streams = TransferStreams(CudaRuntime(DEVICE), backends[name])
    for step in range(1, 30):
        for slot in range(8):
            np.frombuffer(slab.view(slot), dtype=np.uint8)[:] = step
        blocks.fill_(0)
        for _ in range(3):
            busy = (busy @ busy).clamp_(-1, 1)
        read = blocks.clone()
        load = streams.submit(copies(blocks, slab, Direction.LOAD, 8 << 10))
        streams.wait(load)
        after = blocks.clone()
        streams.drain()
        assert not read.any()
        assert (after == step).all()


def test_a_copy_is_refused_while_a_graph_is_captured(backends: dict[str, Backend], slab: Slab) -> None:
    blocks = torch.zeros(1 << 20, dtype=torch.uint8, device=DEVICE)
    stream = torch.cuda.Stream(DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        blocks.add_(1)
        with pytest.raises(TransferError, match="being captured"):
            backends["dma"].execute(copies(blocks, slab, Direction.STORE, 8 << 10), stream.cuda_stream)


@pytest.mark.parametrize("direction", ["store", "load"])
def test_the_chosen_backend_reaches_the_copy_engines_rate(direction: str) -> None:
    """Bars of the project: 0.9 of the bare copy engine from 32 KiB on, 0.7 at 8 KiB from host to device."""
    rows = probe_cuda(DEVICE, (8 << 10, 32 << 10, 128 << 10, 1 << 20)).rows
    for size in (8 << 10, 32 << 10, 128 << 10, 1 << 20):
        best = max(row.share for row in rows if row.direction == direction and row.piece_bytes == size)
        if size >= 32 << 10:
            assert best >= 0.9, (direction, size)
        elif direction == "load":
            assert best >= 0.7, (direction, size)


def test_a_store_beside_it_does_not_slow_a_step(backends: dict[str, Backend], slab: Slab) -> None:
    """At most 1 %, by turns of steps with and without a concurrent store."""
    blocks = torch.zeros(16 << 20, dtype=torch.uint8, device=DEVICE)
    busy = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    streams = TransferStreams(CudaRuntime(DEVICE), backends["dma"])
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(40):
        storing = bool(turn % 2)
        torch.cuda.synchronize()
        if storing:
            streams.submit(copies(blocks, slab, Direction.STORE, 64 << 10))
        started = time.perf_counter()
        for _ in range(10):
            busy @ busy
        torch.cuda.current_stream().synchronize()
        times[storing].append(time.perf_counter() - started)
        streams.drain()
    assert np.median(times[True]) <= 1.01 * np.median(times[False])
