"""Read a stored chunk from a file into a slot, by whichever way is faster.

A file that is in the page cache is copied from there in compiled code, which hashes each piece while it is still in the CPU's cache.
Another is read with O_DIRECT straight into the slot in one call, which also leaves the page cache to others. benchmarks/tiers.py times
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

from lmc.cache.tiers.format import FOOTER_BYTES, checksum
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
    """What each thread needs for every file; making it anew would cost a tenth of a read from the page cache."""

    def __init__(self) -> None:
        self.pages = _aligned_pages(3)  # a payload's last bytes, the footer, and what tells a longer file
        self.behind_payload = np.frombuffer(self.pages, np.uint8)[: FOOTER_BYTES + 1]


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


def read_chunk(source: str, out: memoryview) -> tuple[memoryview, int]:
    """Fill out with the payload; returns the footer, valid until this thread reads again, and the payload's xxh3-64.

    Raises OSError, and Corrupt for another size.
    """
    loop, payload, behind = read_loop(), np.frombuffer(out, np.uint8), scratch.behind_payload
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size, digest, failed = loop.read_and_hash(fd, payload, behind, EDGE, loop.PIECE)
        if size < 0:
            footer = _read_direct(fd, out)
            if footer is not None:
                return footer, checksum(out)
            size, digest, failed = loop.read_and_hash(fd, payload, behind, 0, loop.PIECE)
        if failed:
            os.pread(fd, 1, size)  # raises what the compiled code met
            raise OSError(errno.EIO, "a read failed and then did not")
        if size != len(out) + FOOTER_BYTES:
            found = size if size < len(out) + FOOTER_BYTES else os.fstat(fd).st_size
            raise Corrupt(f"the file has {found} bytes instead of {len(out) + FOOTER_BYTES}")
        return scratch.pages[:FOOTER_BYTES], digest if len(out) >= loop.SHORTEST else checksum(out)
    finally:
        os.close(fd)


def read_footer(source: str, payload_bytes: int) -> bytes:
    """The page behind a payload of that size, and no more of the file. Raises OSError."""
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # else the kernel reads ahead
        return os.pread(fd, FOOTER_BYTES, payload_bytes)
    finally:
        os.close(fd)


def _read_direct(fd: int, out: memoryview) -> memoryview | None:
    """Read the file past the page cache, if that is possible and the file has the right size; returns the footer."""
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
        return None
    out[len(out) - tail :] = scratch.pages[:tail]
    return scratch.pages[tail : tail + FOOTER_BYTES]
