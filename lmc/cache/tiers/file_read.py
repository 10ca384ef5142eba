"""Reads a stored chunk from a file into a slot, in the faster of two ways.

A file in the page cache is copied from there in compiled code, which hashes each piece while it is still in the CPU's cache.
Any other file is read with O_DIRECT straight into the slot in one call, which also spares the page cache. benchmarks/tiers.py times
both ways.

Whether a file is in the page cache is asked with cachestat (Linux 6.5); older kernels always read buffered. Reading
with RWF_NOWAIT would tell too, but makes Linux 6 read ahead, and the disk then reads everything twice.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from functools import cache
from types import ModuleType

import numpy as np

from lmc.cache.tiers.codec import room_for
from lmc.cache.tiers.files import open_to_read
from lmc.cache.tiers.format import FOOTER_BYTES, TierScope
from lmc.errors import Corrupt

# At either end of the payload. A file is read and forgotten from its start to its end, so what lies between is seldom different; to look at
# every page costs a tenth of copying them. The footer doesn't count: a start of lmc reads it alone.
EDGE = 16 << 10
NOT_DIRECT = (
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EFAULT,
)  # the file system, the slot's alignment or its kind of memory
PAGE = FOOTER_BYTES  # direct input and output is of whole pages


class _Scratch(threading.local):
    """Buffers of one thread. To allocate them for each file would cost a tenth of a read from the page cache."""

    def __init__(self) -> None:
        self.pages = _aligned_pages(3)  # a payload's last bytes, the footer, and what tells a longer file
        self.behind_payload = np.frombuffer(self.pages, np.uint8)[: FOOTER_BYTES + 1]
        self.footer = self.pages[:FOOTER_BYTES]  # of the file that was read last


def _aligned_pages(count: int) -> memoryview:
    room = bytearray((count + 1) * PAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(room)) % PAGE
    return memoryview(room)[start : start + count * PAGE]


scratch = _Scratch()


@cache
def read_loop() -> ModuleType:
    """lmc.cache.tiers.read_loop, compiled or read from Numba's cache.

    Not imported before it is needed: vLLM 0.32 for CPUs looks into every module when it starts, and stumbles over Numba's.
    """
    from lmc.cache.tiers import read_loop

    return read_loop


def read_chunk(folder: str, name: str, out: memoryview, scope: TierScope) -> tuple[memoryview, memoryview, int]:
    """Read a file of at most a raw chunk's size: (payload, footer, the payload's checksum in scope), valid until this thread reads again.

    A payload of a raw chunk's size is read into out, a shorter one elsewhere. Raises OSError, and Corrupt for another size or for something
    else than a regular file.
    """
    fd = open_to_read(folder, name)
    try:
        read = _read_and_authenticate if scope.auth_key else _read_and_hash
        expected = os.fstat(fd).st_size - FOOTER_BYTES
        payload = room_for(expected) if 0 < expected < len(out) else out
        size, digest = read(fd, payload, scope)
        if size != len(payload) + FOOTER_BYTES:
            found = size if size < len(payload) + FOOTER_BYTES else os.fstat(fd).st_size
            raise Corrupt(f"the file has {found} bytes instead of {len(payload) + FOOTER_BYTES}")
        return payload, scratch.footer, digest
    finally:
        os.close(fd)


def read_footer(folder: str, name: str) -> bytes:
    """The last page, and no more of the file. Raises OSError, and Corrupt when it is no regular file."""
    fd = open_to_read(folder, name)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # else the kernel reads ahead
        return os.pread(fd, FOOTER_BYTES, max(os.fstat(fd).st_size - FOOTER_BYTES, 0))
    finally:
        os.close(fd)


def _read_and_hash(fd: int, out: memoryview, scope: TierScope) -> tuple[int, int]:
    """The bytes that were read, no more than one beyond the chunk's, and the payload's checksum."""
    loop, payload, behind = read_loop(), np.frombuffer(out, np.uint8), scratch.behind_payload
    scratch.footer = scratch.pages[:FOOTER_BYTES]
    size, digest, failed = loop.read_and_hash(fd, payload, behind, EDGE, loop.PIECE)
    if size < 0:
        if _read_direct(fd, out):
            return len(out) + FOOTER_BYTES, scope.checksum(out)
        size, digest, failed = loop.read_and_hash(fd, payload, behind, 0, loop.PIECE)
    if failed:
        os.pread(fd, 1, size)  # raises what the compiled code met
        raise OSError(errno.EIO, "a read failed and then did not")
    return size, digest if len(out) >= loop.SHORTEST else scope.checksum(out)


def _read_and_authenticate(fd: int, out: memoryview, scope: TierScope) -> tuple[int, int]:
    """The same where the compiled hash is not the one that counts."""
    loop, edge = read_loop(), min(EDGE, len(out))
    scratch.footer = scratch.pages[:FOOTER_BYTES]
    cached = loop._is_cached(fd, 0, edge) and loop._is_cached(fd, len(out) - edge, edge)
    size = 0
    if not cached and _read_direct(fd, out):
        size = len(out) + FOOTER_BYTES
    while size <= len(out) + FOOTER_BYTES:
        rest = scratch.pages[max(size - len(out), 0) : FOOTER_BYTES + 1]
        count = os.preadv(fd, [out[size:], rest] if size < len(out) else [rest], size)
        if count == 0:
            break
        size += count
    return size, scope.checksum(out)


def _read_direct(fd: int, out: memoryview) -> bool:
    """Read the file past the page cache, if that is possible and the file has the right size."""
    tail = len(out) % PAGE  # direct reads are of whole pages; the kernel stops at the end of the file by itself
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        size = os.preadv(fd, [out[: len(out) - tail], scratch.pages], 0)
    except OSError as error:
        if error.errno not in NOT_DIRECT:
            raise
        size = 0
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    if size != len(out) + FOOTER_BYTES:
        return False
    out[len(out) - tail :] = scratch.pages[:tail]
    scratch.footer = scratch.pages[tail : tail + FOOTER_BYTES]
    return True
