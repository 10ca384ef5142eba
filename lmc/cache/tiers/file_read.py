"""Read a stored chunk from a file into a slot, by whichever way is faster.

A file that is in the page cache is copied from there, a piece at a time, and hashed while the piece is still in the CPU's cache. Another is
read with O_DIRECT straight into the slot in one call, which also leaves the page cache to others. benchmarks/tiers.py times both ways.

Whether a file is in the page cache is asked with cachestat (Linux 6.5); older kernels always read buffered. Reading
with RWF_NOWAIT would tell too, but makes Linux 6 read ahead, and the disk then reads everything twice.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading

import xxhash

from lmc.cache.tiers.format import HEADER_BYTES, aligned_page
from lmc.errors import Corrupt

_PIECE = 1 << 20  # fits the CPU's second cache, so that the hash does not wait for memory
_EDGE = 16 << 10  # of the payload, at either end
NOT_DIRECT = (
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EFAULT,
)  # the file system, the slot's alignment or its kind of memory
_CACHESTAT = 451  # the system call's number on every architecture

_libc = ctypes.CDLL(None)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)


class _Scratch(threading.local):
    """What each thread needs for every file; making it anew would cost a tenth of a read from the page cache."""

    def __init__(self) -> None:
        self.header = aligned_page()
        self.last_page = aligned_page()
        self.area = (ctypes.c_uint64 * 2)()  # start, length
        self.pages = (ctypes.c_uint64 * 5)()  # cached, dirty, in writeback, evicted, recently evicted


scratch = _Scratch()


def read_chunk(source: str, out: memoryview) -> tuple[memoryview, int]:
    """Fill out with the payload; returns the header, valid until this thread reads again, and the payload's xxh3-64.

    Raises OSError, and Corrupt for another size.
    """
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header, wanted = scratch.header, HEADER_BYTES + len(out)
        position = 0 if in_page_cache(fd, wanted) else _read_direct(fd, header, out)
        hashed = max(position - HEADER_BYTES, 0)
        hasher = xxhash.xxh3_64(out[:hashed])
        while position < wanted:
            count = os.preadv(fd, _span(header, out, position), position)
            position += count
            if count == 0 or position > wanted:
                break
            ready = max(position - HEADER_BYTES, 0)
            hasher.update(out[hashed:ready])
            hashed = ready
        if position != wanted:
            size = position if position < wanted else os.fstat(fd).st_size
            raise Corrupt(f"the file has {size} bytes instead of {wanted}")
        return header, hasher.intdigest()
    finally:
        os.close(fd)


def read_header(source: str) -> bytes:
    """The first page of a file, and no more of it. Raises OSError."""
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # else the kernel reads ahead
        return os.pread(fd, HEADER_BYTES, 0)
    finally:
        os.close(fd)


def in_page_cache(fd: int, size: int) -> bool:
    """Whether both ends of the payload are in memory, or the kernel does not say.

    A file is read and forgotten from its start to its end, so what lies between is seldom different; to look at every page costs a tenth of
    copying them. The header doesn't count: a start of lmc reads it alone.
    """
    edge = min(_EDGE, size - HEADER_BYTES)
    return _is_cached(fd, HEADER_BYTES, edge) and _is_cached(fd, size - edge, edge)


def _is_cached(fd: int, start: int, length: int) -> bool:
    area, pages = scratch.area, scratch.pages
    area[0], area[1] = start, length
    failed = _libc.syscall(_CACHESTAT, fd, area, pages, 0)
    return failed != 0 or pages[0] * mmap.PAGESIZE >= length


def _span(header: memoryview, out: memoryview, start: int) -> list[memoryview]:
    """Where a piece of the file from start on goes. One byte more than the file should have is asked for, which tells a longer file."""
    piece = max(start - HEADER_BYTES, 0)
    parts = [out[piece : piece + _PIECE]]
    if start < HEADER_BYTES:
        parts.insert(0, header[start:])
    if piece + _PIECE >= len(out):
        parts.append(scratch.last_page[:1])
    return parts


def _read_direct(fd: int, header: memoryview, out: memoryview) -> int:
    """Read the file past the page cache, if that is possible; returns where it stopped, beyond the end of out if the file is longer."""
    size = HEADER_BYTES + len(out)
    tail = size % HEADER_BYTES  # direct reads are of whole pages; the kernel stops at the end of the file by itself
    last = scratch.last_page
    position = 0
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        position = os.preadv(fd, [header, out[: len(out) - tail], last], 0)
    except OSError as error:
        if error.errno not in NOT_DIRECT:
            raise
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    if position < size:
        return min(position, size - tail)
    out[len(out) - tail :] = last[:tail]
    return position
