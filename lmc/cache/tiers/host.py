"""The host tier's memory: one slab of equal slots, mapped once and never grown."""

from __future__ import annotations

import mmap
import threading

import numpy as np

from lmc.errors import TierError

_PAGE = mmap.PAGESIZE
_PREFAULT_BYTES = 64 << 20


class HostSlab:
    """num_slots slots of slot_bytes, each starting on a page. Pages are touched in the background, so that a first store is not slowed."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._stride = -(-slot_bytes // _PAGE) * _PAGE
        size = max(num_slots * self._stride, _PAGE)
        try:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise TierError(f"host tier: cannot map {size} bytes: {error}; lower host.capacity") from error
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self._base = self._bytes.ctypes.data
        self._closed = threading.Event()
        self._toucher = threading.Thread(target=self._touch_pages, name="lmc-prefault", daemon=True)
        self._toucher.start()

    def address(self, slot: int) -> int:
        """Where a slot starts in this process."""
        self._check(slot)
        return self._base + slot * self._stride

    def view(self, slot: int) -> memoryview:
        """A slot's bytes, writable in place."""
        self._check(slot)
        start = slot * self._stride
        return memoryview(self._memory)[start : start + self.slot_bytes]

    def close(self) -> None:
        self._closed.set()
        self._toucher.join()

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} does not exist; there are {self.num_slots}")

    def _touch_pages(self) -> None:
        # Reading maps the zero page only, and writing could race with a store; MADV_POPULATE_WRITE faults pages in without changing them.
        populate = 23
        for start in range(0, len(self._bytes), _PREFAULT_BYTES):
            if self._closed.is_set():
                return
            try:
                self._memory.madvise(populate, start, min(_PREFAULT_BYTES, len(self._bytes) - start))
            except OSError:
                return  # an older kernel; pages are then faulted in by the first store
