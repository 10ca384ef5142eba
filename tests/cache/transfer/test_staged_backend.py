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


class Aligned(HostBackend):
    """Takes what is a multiple of 16 bytes, and counts how often it was asked."""

    asked = 0

    def refuses(self, descriptors: Descriptors) -> str:
        self.asked += 1
        return "odd" if int(np.bitwise_or.reduce(descriptors.src | descriptors.dst | descriptors.size)) % 16 else ""


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=30),
    st.sampled_from([1, 4, 8, 16, 32]),
    st.sampled_from([1, 16]),
    st.sampled_from(list(Direction)),
)
def test_a_refusal_is_what_the_rounds_would_meet_and_costs_one_question(
    copies: list[tuple[int, int]], unit: int, slot_unit: int, direction: Direction
) -> None:
    """A batch is gathered once, when it is copied, and not a second time to find out whether it can be."""
    local = Aligned()
    staged = StagedBackend(local, HostBackend(), 1 << 20, 1024, None)
    size = np.array([length * unit for _, length in copies], dtype=np.uint64)
    blocks = np.array([4096 * index + gap * unit for index, (gap, _) in enumerate(copies)], dtype=np.uint64)
    slots = np.array([(1 << 30) + 4096 * index + slot_unit for index in range(len(copies))], dtype=np.uint64)
    pair = (blocks, slots) if direction is Direction.STORE else (slots, blocks)
    descriptors = Descriptors(*pair, size, direction)
    answer = staged.refuses(descriptors)
    assert local.asked == 1
    assert bool(answer) == any(local.refuses(one) for one, _ in staged._rounds(descriptors))
