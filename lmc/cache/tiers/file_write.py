"""Writes a chunk from a slot into a new file, past the page cache if that is possible.

A write into the page cache costs a core for the copy and for finding pages; on a CPU engine that core is missing from the forward pass.
The page cache stays free for other programs: chunks that are used often are in host memory already.
"""

from __future__ import annotations

import fcntl
import os

from lmc.cache.tiers.file_read import NOT_DIRECT, PAGE, scratch


def write_chunk(fd: int, data: memoryview, footer: bytes) -> None:
    """Fill an empty file with data and footer. Raises OSError."""
    page = scratch.pages[: len(footer)]
    page[:] = footer
    position = _write_direct(fd, data, page)
    while position < len(data) + len(page):
        parts = [data[position:]] if position < len(data) else []
        position += os.pwritev(fd, [*parts, page[max(position - len(data), 0) :]], position)


def _write_direct(fd: int, data: memoryview, page: memoryview) -> int:
    """Write whole pages past the page cache, if that is possible. Returns the offset up to which it wrote."""
    tail = len(data) % PAGE
    parts = [data, page] if tail == 0 else [data[: len(data) - tail]]
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        return os.pwritev(fd, parts, 0)
    except OSError as error:
        if error.errno not in NOT_DIRECT:
            raise
        return 0
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
