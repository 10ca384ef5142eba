from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.tiers import file_read, read_loop
from lmc.cache.tiers import format as chunk_format
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import FOOTER_BYTES, FORMAT, TierScope
from lmc.errors import Corrupt, TierError
from tests.contracts.tier import CHUNK_BYTES, SCOPE, BoundedTierContract, OpenTier, key, load, payload
from tests.faults.test_tier_disk import pretend_cached


class TestDiskTier(BoundedTierContract):
    @pytest.fixture
    def open_tier(self, tmp_path: Path) -> OpenTier:
        return lambda scope: DiskTier(tmp_path, scope)


def file_of(folder: Path, number: int, scope: TierScope = SCOPE) -> Path:
    name = key(number).hex()
    return folder / FORMAT / scope.namespace / f"r{scope.rank}" / name[:2] / name


def drop_from_page_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@settings(max_examples=60, deadline=None)
@given(
    size=st.one_of(
        st.integers(1, 20_000), st.integers(0, 20).map(lambda pages: max(1, pages * 4096)), st.just(2_500_001)
    ),
    cached=st.lists(st.booleans(), max_size=6),
    offset=st.sampled_from([0, 1, 512]),
    piece=st.sampled_from([4 << 20, 1 << 20, 500_001]),
)
def test_every_way_of_reading_gives_the_same_bytes(size: int, cached: list[bool], offset: int, piece: int) -> None:
    """Any part of the file may be in the page cache, and the slot may start anywhere."""
    scope = TierScope(SCOPE.namespace, 0, SCOPE.layout, size)
    with tempfile.TemporaryDirectory() as name:
        tier = DiskTier(Path(name), scope)
        tier.put(key(1), payload(1, size))
        path = file_of(Path(name), 1)
        drop_from_page_cache(path)
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
            for index, wanted in enumerate(cached):
                if wanted:
                    os.pread(file.fileno(), 1, index * (size + FOOTER_BYTES) // len(cached))
        slot = memoryview(mmap.mmap(-1, size + offset))[offset:]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(read_loop, "PIECE", piece)
            tier.get(key(1), slot)
        assert slot == payload(1, size)


def test_a_file_system_without_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, SCOPE)
    tier.put(key(1), payload(1))
    pretend_cached(monkeypatch, False)
    plain = os.preadv
    refused = []

    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "no direct I/O")
        return plain(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    assert load(tier, 1) == payload(1)
    assert refused == [0]


@pytest.mark.parametrize("payload_bytes", [40_960, 40_000])
@pytest.mark.parametrize("change", [-40_000, -FOOTER_BYTES, -1, 0, 1, FOOTER_BYTES, 50_000])
def test_a_direct_read_finds_the_size_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload_bytes: int, change: int
) -> None:
    scope = replace(SCOPE, chunk_bytes=payload_bytes)
    tier = DiskTier(tmp_path, scope)
    tier.put(key(1), payload(1, payload_bytes))
    os.truncate(file_of(tmp_path, 1, scope), payload_bytes + FOOTER_BYTES + change)
    slot = memoryview(mmap.mmap(-1, payload_bytes))  # aligned as O_DIRECT wants it
    plain, read = os.preadv, []

    def note(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append(plain(fd, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", note)
    pretend_cached(monkeypatch, False)
    if change == 0:
        tier.get(key(1), slot)
        assert slot == payload(1, payload_bytes)
    else:
        with pytest.raises(Corrupt, match=f"has {payload_bytes + FOOTER_BYTES + change} bytes instead"):
            tier.get(key(1), slot)
    assert len(read) == 1


@settings(deadline=None)
@given(
    size=st.integers(1, 5 * FOOTER_BYTES), offset=st.sampled_from([0, 1, 512, FOOTER_BYTES]), step=st.integers(1, 9000)
)
def test_writes_of_any_size_alignment_and_length_of_step(size: int, offset: int, step: int) -> None:
    """Direct where the memory allows, the rest through the page cache; the kernel may write less than asked in each call."""
    slot = memoryview(mmap.mmap(-1, size + offset))[offset:]
    slot[:] = payload(1, size)
    direct, plain = [], os.pwritev

    def write_some(fd: int, buffers: list[memoryview], position: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(position)
            return plain(fd, buffers[: 1 + step % 2], position)
        return plain(fd, [buffers[0][:step]], position)

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        scope = TierScope("ns", 0, "layout", size)
        tier = DiskTier(Path(name), scope)
        patch.setattr(os, "pwritev", write_some)
        tier.put(key(1), slot)
        content = file_of(Path(name), 1, scope).read_bytes()
    assert direct == [0]
    assert content[:size] == slot
    assert len(content) == size + FOOTER_BYTES


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.pwritev

    def refuse(fd: int, buffers: list[memoryview], position: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O")
        return plain(fd, buffers, position)

    monkeypatch.setattr(os, "pwritev", refuse)
    tier = DiskTier(tmp_path, SCOPE)
    tier.put(key(1), payload(1))
    assert load(tier, 1) == payload(1)


def test_the_page_cache_is_told_from_the_disk(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(read_loop._CACHESTAT, -1, None, None, 0)
    kernel_says = ctypes.get_errno() == errno.EBADF
    size = 100_001
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    out, behind = np.zeros(size - FOOTER_BYTES, np.uint8), np.zeros(FOOTER_BYTES, np.uint8)

    def read(fd: int) -> int:
        return int(read_loop.read_and_hash(fd, out, behind, file_read.EDGE, read_loop.PIECE)[0])

    fd = os.open(path, os.O_RDONLY)
    assert read(fd) == size, "it was just written"
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    start, end = (0, file_read.EDGE), (len(out) - file_read.EDGE, file_read.EDGE)
    for cached in ([], [(50_000, 1)], [(size - 1, 1)], [(0, 1)], [start], [end], [start, (len(out) - 1, 1)]):
        drop_from_page_cache(path)
        for position, length in cached:
            os.pread(fd, length, position)
        assert read(fd) == (-1 if kernel_says else size)
    os.pread(fd, *reversed(end))
    assert read(fd) == size, "the ends of the payload count, not what lies between"
    os.close(fd)
    assert read_loop._is_cached(fd, 0, 1), "when the call fails, reads are buffered"


def test_files_are_found_by_another_process(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, SCOPE)
    tier.put(key(1), payload(1))
    script = (
        "import sys; from pathlib import Path; from lmc.cache.tiers.disk import DiskTier; "
        "from tests.contracts.tier import SCOPE, load, payload; "
        "tier = DiskTier(Path(sys.argv[1]), SCOPE); assert load(tier, 1) == payload(1); print(len(list(tier.scan())))"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_scan_goes_from_the_oldest_to_the_youngest(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, SCOPE)
    order = [3, 1, 4, 0, 2]
    for number in range(5):
        tier.put(key(number), payload(number))
    for age, number in enumerate(order):
        os.utime(file_of(tmp_path, number), (age, age))
    assert [found for found, _ in tier.scan()] == [key(number) for number in order]


def test_scan_removes_what_dead_writers_left_and_spares_the_living(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, SCOPE)
    fd, living = tier._create()
    living = Path(living)
    dead = living.with_name("dead-0")
    dead.write_bytes(b"half a chunk")
    assert list(DiskTier(tmp_path, SCOPE).scan()) == []
    assert living.exists()
    assert not dead.exists()
    os.close(fd)
    assert list(tier.scan()) == []
    assert not living.exists()


def test_scan_ignores_what_is_no_chunk(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, SCOPE)
    tier.put(key(1), payload(1))
    chunk = file_of(tmp_path, 1)
    (chunk.parent / "README").write_text("hello")
    (chunk.parent / key(2).hex()).write_bytes(b"too short")
    (chunk.parent.parent / "notes.txt").write_text("hello")
    (chunk.parent.parent / "lost+found").mkdir()
    older = tmp_path / "v0" / SCOPE.namespace / "r0" / "ab"
    older.mkdir(parents=True)
    (older / ("ab" * 32)).write_bytes(bytes(FOOTER_BYTES + CHUNK_BYTES))
    assert [found for found, _ in tier.scan()] == [key(1)]


def test_a_footer_of_another_version_is_said_to_be_one_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(chunk_format, "VERSION", 0)
        DiskTier(tmp_path, replace(SCOPE)).put(key(1), payload(1))  # a new scope: a used one remembers its footer
    tier = DiskTier(tmp_path, SCOPE)
    with pytest.raises(Corrupt, match="footer is of version 0; this lmc reads version 4"):
        load(tier, 1)
    tier.put(key(1), payload(2))
    assert load(tier, 1) == payload(2)


def test_a_folder_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TierError, match=r"^disk tier: cannot write in .*/file/v4/.*: Not a directory$"):
        DiskTier(tmp_path / "file", SCOPE)
