"""Write a chunk from a slot into a new file, past the page cache where that is possible.

A write into the page cache costs a core for the copy and for finding pages; on a CPU engine that core is missing from the forward pass.
The page cache is left to others: what is hot lies in host memory already.
"""

from __future__ import annotations

import fcntl
import os

from lmc.cache.tiers.file_read import NOT_DIRECT, scratch
from lmc.cache.tiers.format import HEADER_BYTES


def write_chunk(fd: int, header: bytes, data: memoryview) -> None:
    """Fill an empty file with header and data. Raises OSError."""
    page = scratch.header
    page[:] = header
    position = _write_direct(fd, page, data)
    while position < HEADER_BYTES + len(data):
        parts = [page[position:]] if position < HEADER_BYTES else []
        position += os.pwritev(fd, [*parts, data[max(position - HEADER_BYTES, 0) :]], position)


def _write_direct(fd: int, page: memoryview, data: memoryview) -> int:
    """Write whole pages past the page cache, if that is possible; returns where it stopped."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        return os.pwritev(fd, [page, data[: len(data) - len(data) % HEADER_BYTES]], 0)
    except OSError as error:
        if error.errno not in NOT_DIRECT:
            raise
        return 0
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
