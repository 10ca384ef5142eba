from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.transfer.backends.dma import DmaBackend
from lmc.cache.transfer.backends.host import HostBackend
from lmc.cache.transfer.backends.reference import TorchBackend
from lmc.cache.transfer.backends.staged import StagedBackend
from lmc.cache.transfer.planner import Descriptors, Direction
from lmc.errors import TransferError
from tests.cache.transfer.fake_driver import fake_driver
from tests.contracts.transfer import block_tables, check_backend, engines, vllm_engine


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(0, 2**20), st.sampled_from([512, 1024, 4096, 1 << 16]))
def test_every_layout_round_trips(data: st.DataObject, seed: int, buffer_bytes: int) -> None:
    buffer = np.zeros(buffer_bytes, dtype=np.uint8)
    staged = StagedBackend(HostBackend(), DmaBackend(fake_driver()[0]), buffer.ctypes.data, buffer_bytes, buffer)
    engine = data.draw(engines())
    check_backend(staged, engine, data.draw(block_tables(engine.layout.num_blocks)), seed, stream=7)


def test_a_slot_crosses_in_one_copy() -> None:
    driver, library = fake_driver()
    buffer = np.zeros(1 << 16, dtype=np.uint8)
    staged = StagedBackend(HostBackend(), DmaBackend(driver), buffer.ctypes.data, len(buffer), buffer)
    check_backend(staged, vllm_engine("LHBNC", torch.float16), [[4, 1], [0, 3]], 0, stream=7)
    assert [count for count, _, _ in library.batches] == [2, 2]


def test_a_buffer_without_room_is_refused() -> None:
    with pytest.raises(TransferError, match="too small"):
        StagedBackend(HostBackend(), HostBackend(), 0, 256, None)


def test_what_the_local_backend_refuses_is_refused_in_every_round() -> None:
    class Picky(HostBackend):
        def refuses(self, descriptors: Descriptors) -> str:
            return "odd" if (descriptors.size % np.uint64(16)).any() else ""

    staged = StagedBackend(Picky(), HostBackend(), 0, 1024, None)
    addresses = np.arange(1, 5, dtype=np.uint64) * np.uint64(4096)
    even = Descriptors(addresses, addresses * np.uint64(8), np.full(4, 256, dtype=np.uint64), Direction.STORE)
    assert staged.refuses(even) == ""
    last_odd = Descriptors(even.src, even.dst, np.array([256, 256, 256, 8], dtype=np.uint64), Direction.STORE)
    assert staged.refuses(last_odd) == "odd"


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(0, 2**20))
def test_the_torch_reference_round_trips(data: st.DataObject, seed: int) -> None:
    engine = data.draw(engines())
    check_backend(TorchBackend("cpu"), engine, data.draw(block_tables(engine.layout.num_blocks)), seed)
