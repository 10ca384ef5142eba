from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.transfer.backends.host import HostBackend, split_evenly
from lmc.cache.transfer.planner import Descriptors, Direction
from tests.contracts.transfer import block_tables, check_backend, engines


@pytest.mark.parametrize("stream_bytes", [0, 1 << 30], ids=["past the caches", "through the caches"])
def test_every_layout_round_trips(stream_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmc.cache.transfer.backends.host.STREAM_BYTES", stream_bytes)

    @settings(deadline=None, max_examples=200)
    @given(st.data(), st.integers(0, 2**20))
    def check(data: st.DataObject, seed: int) -> None:
        engine = data.draw(engines())
        check_backend(HostBackend(), engine, data.draw(block_tables(engine.layout.num_blocks)), seed)

    check()


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 130), st.integers(0, 130), st.integers(1, 1500)), min_size=1, max_size=5))
def test_any_alignment_and_size_is_copied_exactly(pieces: list[tuple[int, int, int]]) -> None:
    """The streaming loop takes aligned vectors in the middle; heads and tails of every length are around them."""
    source = np.random.default_rng(0).integers(1, 256, 8192 + 64, dtype=np.uint8)
    target = np.zeros_like(source)
    expected = target.copy()
    columns = []
    for number, (src, dst, size) in enumerate(pieces):
        src, dst = src + number * 1600, dst + number * 1600
        size = min(size, 1600 - 130)
        expected[dst : dst + size] = source[src : src + size]
        columns.append((source.ctypes.data + src, target.ctypes.data + dst, size))
    copies = Descriptors(*np.array(columns, dtype=np.uint64).T.copy(), Direction.LOAD)
    HostBackend()._streaming(copies.src, copies.dst, copies.size)
    assert np.array_equal(target, expected)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 8))
def test_shares_cover_every_byte_once_and_are_even(sizes: list[int], parts: int) -> None:
    size = np.array(sizes, dtype=np.uint64)
    src = np.cumsum(size * np.uint64(2), dtype=np.uint64) - size  # a gap after each
    dst = src + np.uint64(10_000)
    shares = split_evenly(src, dst, size, parts)
    wanted = {int(start) + step for start, length in zip(src, sizes, strict=True) for step in range(length)}
    seen: list[int] = []
    for share_src, share_dst, share_size in shares:
        assert (share_dst - share_src == 10_000).all()
        assert (share_size > 0).all()
        seen += [
            int(start) + step
            for start, length in zip(share_src, share_size, strict=True)
            for step in range(int(length))
        ]
        assert abs(int(share_size.sum()) - sum(sizes) / parts) <= 1
    assert len(seen) == len(set(seen))
    assert set(seen) == wanted


def test_threads_copy_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmc.cache.transfer.backends.host.MIN_THREAD_BYTES", 1)
    backend = HostBackend(threads=3)
    import torch

    from tests.contracts.transfer import vllm_engine

    check_backend(backend, vllm_engine("LHBNC", torch.bfloat16), [[3, 1], [0, 6]], 1)
    backend.close()


def test_it_works_where_compiled_code_cannot_be_kept() -> None:
    """A read-only installation without a home: Numba finds no place for its cache."""
    code = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
import numpy as np
from lmc.cache.transfer.backends.copy_loop import stream_loop
source, target = np.arange(100, dtype=np.uint8), np.zeros(100, dtype=np.uint8)
stream_loop(*(np.array([value], dtype=np.uint64) for value in (source.ctypes.data, target.ctypes.data, 100)))
assert (source == target).all()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
