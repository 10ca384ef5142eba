"""Gather into one device buffer and copy that in one piece, or the other way round: for pieces too small for the copy engine.

Both steps are descriptors again, so any two backends serve: one that moves bytes on the device, one that crosses the bus.
"""

from __future__ import annotations

import numpy as np

from lmc.cache.transfer.backends.base import Backend
from lmc.cache.transfer.planner import Addresses, Descriptors, Direction, fragment, merge
from lmc.errors import TransferError

ALIGNMENT = 256


class StagedBackend:
    name = "staged"

    def __init__(self, local: Backend, across: Backend, buffer: int, buffer_bytes: int, owner: object) -> None:
        """buffer: address of buffer_bytes of device memory. One half serves the store stream, the other the load stream.

        owner is what the buffer belongs to; it lives as long as the backend.
        """
        self._local = local
        self._across = across
        self._owner = owner
        self._half = buffer_bytes // 2 // ALIGNMENT * ALIGNMENT
        if self._half == 0:
            raise TransferError(f"a staging buffer of {buffer_bytes} bytes is too small")
        self._buffers = {Direction.STORE: buffer, Direction.LOAD: buffer + self._half}

    def refuses(self, descriptors: Descriptors) -> str:
        """What the device's side says of the blocks: places in the buffer follow from the sizes, and start well aligned."""
        blocks = descriptors.blocks
        return self._local.refuses(Descriptors(blocks, blocks, descriptors.size, descriptors.direction))

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        for local, across in self._rounds(descriptors):
            if descriptors.direction is Direction.STORE:
                self._local.execute(local, stream)
                self._across.execute(across, stream)
            else:
                self._across.execute(across, stream)
                self._local.execute(local, stream)

    def _rounds(self, descriptors: Descriptors) -> list[tuple[Descriptors, Descriptors]]:
        """(copies on the device, copies across the bus) of each bufferful, in stream order."""
        parts = fragment(descriptors, self._half)
        slots, blocks = parts.slots, parts.blocks
        order = np.argsort(slots)
        slots, blocks, size = slots[order], blocks[order], parts.size[order]
        rounds = []
        for low, high in _bufferfuls(size, self._half):
            length = size[low:high]
            staged = np.uint64(self._buffers[descriptors.direction]) + np.cumsum(length) - length
            local = self._copies(blocks[low:high], staged, length, descriptors.direction)
            across = self._copies(*merge(staged, slots[low:high], length), descriptors.direction)
            rounds.append((local, across))
        return rounds

    @staticmethod
    def _copies(engine_side: Addresses, slot_side: Addresses, size: Addresses, direction: Direction) -> Descriptors:
        if direction is Direction.STORE:
            return Descriptors(engine_side, slot_side, size, direction)
        return Descriptors(slot_side, engine_side, size, direction)


def _bufferfuls(size: Addresses, capacity: int) -> list[tuple[int, int]]:
    """Consecutive ranges of descriptors whose bytes fit the buffer; no descriptor is larger than it."""
    ends = np.cumsum(size)
    ranges, low = [], 0
    while low < len(size):
        before = int(ends[low] - size[low])
        high = int(np.searchsorted(ends, before + capacity, side="right"))
        ranges.append((low, high))
        low = high
    return ranges
