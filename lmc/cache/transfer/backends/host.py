"""Copies between ordinary memory, in compiled code without the GIL. Any thread; a call returns when the bytes are in place."""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from lmc.cache.transfer.planner import Addresses, Descriptors, Direction

MIN_THREAD_BYTES = 4 << 20  # below this a second thread costs more than it copies
STREAM_BYTES = 8 << 20  # larger batches would push everything else out of the caches, and be pushed out themselves

_Copy = Callable[[Addresses, Addresses, Addresses], None]


class HostBackend:
    name = "host"

    def __init__(self, threads: int = 1) -> None:
        """threads: how many copy at once, the caller's included; useful_threads() measures what helps."""
        self.threads = threads
        self._cached, self._streaming = _loops()
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="lmc-copy") if threads > 1 else None
        self._lock = threading.Lock()  # one call at a time shares the pool out; others copy alone

    def refuses(self, descriptors: Descriptors) -> str:
        return ""

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        src, dst, size = descriptors.src, descriptors.dst, descriptors.size
        num_bytes = descriptors.num_bytes
        copy = self._streaming if num_bytes >= STREAM_BYTES else self._cached
        parts = min(self.threads, num_bytes // MIN_THREAD_BYTES)
        if self._pool is None or parts < 2 or not self._lock.acquire(blocking=False):
            copy(src, dst, size)
            return
        try:
            shares = split_evenly(src, dst, size, parts)
            waiting = [self._pool.submit(copy, *share) for share in shares[1:]]
            copy(*shares[0])
            for future in waiting:
                future.result()
        finally:
            self._lock.release()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def split_evenly(
    src: Addresses, dst: Addresses, size: Addresses, parts: int
) -> list[tuple[Addresses, Addresses, Addresses]]:
    """Consecutive shares of about equal bytes; a descriptor that lies across a border is cut in two."""
    ends = np.cumsum(size)
    total = int(ends[-1]) if len(ends) else 0
    borders = np.array([total * part // parts for part in range(1, parts)], dtype=np.uint64)
    cuts = np.unique(np.concatenate((ends, borders[(borders > 0) & (borders < total)])))
    starts = np.concatenate((np.zeros(1, np.uint64), cuts[:-1]))
    row = np.searchsorted(ends, starts, side="right")
    within = starts - (ends[row] - size[row])
    pieces = (src[row] + within, dst[row] + within, cuts - starts)
    edges = [0, *(int(edge) for edge in np.searchsorted(starts, borders)), len(starts)]
    return [
        (pieces[0][low:high], pieces[1][low:high], pieces[2][low:high])
        for low, high in itertools.pairwise(edges)
        if high > low
    ]


def useful_threads(limit: int = 8, gain: float = 1.2) -> int:
    """How many threads copy fastest, in less than 100 ms; one more pair must bring `gain`.

    On small machines one core fills the memory bus, and a second thread only takes time from the model.
    """
    piece, count = 1 << 20, 16
    source, target = (np.ones(piece * count, dtype=np.uint8) for _ in range(2))
    places = np.arange(count, dtype=np.uint64) * np.uint64(piece)
    size = np.full(count, piece, dtype=np.uint64)
    copies = Descriptors(source.ctypes.data + places, target.ctypes.data + places, size, Direction.STORE)
    best, fastest, threads = 1, _seconds(HostBackend(1), copies), 2
    while threads <= min(limit, len(os.sched_getaffinity(0))):
        backend = HostBackend(threads)
        seconds = _seconds(backend, copies)
        backend.close()
        if seconds * gain > fastest:
            break
        best, fastest, threads = threads, seconds, threads * 2
    return best


def _seconds(backend: HostBackend, copies: Descriptors) -> float:
    times = []
    for _ in range(4):
        started = time.perf_counter()
        backend.execute(copies)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first one warms up


@cache
def _loops() -> tuple[_Copy, _Copy]:
    """(through the caches, past them), compiled or read from Numba's cache on disk."""
    from lmc.cache.transfer.backends.copy_loop import copy_loop, stream_loop

    return copy_loop, stream_loop
