"""Read a stored chunk from a file into a slot, by whichever way is faster.

What the page cache has is copied from there, a piece at a time, and hashed while it is still in the CPU's cache. The rest is read with
O_DIRECT straight into the slot in one call. Measured on one virtual disk with 4 MiB files: 8-11 GB/s from the page cache; from the disk
1.4-1.9 GB/s directly against 0.4-1.2 GB/s buffered.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import xxhash

from lmc.cache.tiers.format import HEADER_BYTES
from lmc.errors import Corrupt

_PIECE = 1 << 20
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)  # the file system or the slot's alignment does not allow it


def read_chunk(source: Path, page: memoryview, out: memoryview) -> int:
    """Fill page with the header and out with the payload; returns the payload's xxh3-64. Raises OSError, and Corrupt for another size."""
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size, wanted = os.fstat(fd).st_size, HEADER_BYTES + len(out)
        if size != wanted:
            raise Corrupt(f"the file has {size} bytes instead of {wanted}")
        hasher = xxhash.xxh3_64()
        position = _read_cached(fd, page, out, hasher)
        hashed = max(position - HEADER_BYTES, 0)
        position = _read_direct(fd, page, out, position)
        while position < wanted:
            count = os.preadv(fd, _span(page, out, position, wanted), position)
            if count == 0:
                raise Corrupt(f"the file ended at byte {position} while it was read")
            position += count
        hasher.update(out[hashed:])
        return hasher.intdigest()
    finally:
        os.close(fd)


def _span(page: memoryview, out: memoryview, start: int, end: int) -> list[memoryview]:
    """Where the bytes [start, end) of the file go."""
    parts = [page[start:end]] if start < HEADER_BYTES else []
    return [*parts, out[max(start - HEADER_BYTES, 0) : end - HEADER_BYTES]]


def _read_cached(fd: int, page: memoryview, out: memoryview, hasher: xxhash.xxh3_64) -> int:
    """Read and hash from the start what needs no waiting; returns where it stopped, the end or the start of a page."""
    position, size = 0, HEADER_BYTES + len(out)
    while position < size:
        end = min(position + _PIECE, size)
        try:
            count = os.preadv(fd, _span(page, out, position, end), position, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            return position
        stop = position + count
        if stop < end:
            stop -= stop % HEADER_BYTES
        hasher.update(out[max(position - HEADER_BYTES, 0) : max(stop - HEADER_BYTES, 0)])
        if stop < end:
            return stop
        position = stop
    return position


def _read_direct(fd: int, page: memoryview, out: memoryview, position: int) -> int:
    """Read whole pages past the page cache where that is possible; returns where it stopped."""
    size = HEADER_BYTES + len(out)
    end = size - size % HEADER_BYTES
    if position >= end:
        return position
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        position += os.preadv(fd, _span(page, out, position, end), position)
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return position
