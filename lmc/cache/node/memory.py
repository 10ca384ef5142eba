"""The memory of a node: one sealed memfd that every worker maps, divided into extents that namespaces get and give back.

Chunks of one namespace have one size, those of another one another: so memory is handed out in extents, and a namespace lays slots of its
own size into the extents that it has. An extent goes to another namespace only when no slot of it is in use.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Sequence

import numpy as np

from lmc.cache.transfer.pinned import touch
from lmc.errors import ConfigError, NodeError
from lmc.units import format_size

UNIT = mmap.PAGESIZE
_EXTENTS = 64  # that a memory is divided into
_EXTENT_BYTES = (64 << 10, 1 << 30)
_MOST_WASTE = 8  # a run of extents leaves at most this part of itself over
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def whole_pages(size: int) -> int:
    return -(-size // UNIT) * UNIT


class Memory:
    """size bytes, which no peer can make smaller: one that did would kill every process that reads them."""

    def __init__(self, size: int) -> None:
        """Raises ConfigError when the memory cannot be had."""
        self.size = size // UNIT * UNIT
        if self.size < _EXTENT_BYTES[0]:
            raise ConfigError(f"host.capacity {format_size(size)} is too small for a node; raise it")
        try:
            self.descriptor = os.memfd_create("lmc-node", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.descriptor, self.size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping = mmap.mmap(self.descriptor, self.size)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(f"host.capacity: cannot get {format_size(self.size)} of shared memory: {error}") from None
        self.bytes = np.frombuffer(self._mapping, dtype=np.uint8)
        self._closing = threading.Event()
        touching = (self.bytes.ctypes.data, self.size, self._closing)  # now, so that no store waits for it
        self._toucher = threading.Thread(target=touch, args=touching, name="lmc-node-memory", daemon=True)
        self._toucher.start()

    def close(self) -> None:
        """The workers' mappings stay until they let go."""
        self._closing.set()
        self._toucher.join()
        os.close(self.descriptor)


def map_memory(descriptor: int, size: int) -> mmap.mmap:
    """A worker's mapping of a node's memory. Raises NodeError if the descriptor is not such a memory."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK or os.fstat(descriptor).st_size != size:
            raise NodeError("node: the memory that the node has sent is not as it says")
        mapping = mmap.mmap(descriptor, size)
        mapping.madvise(mmap.MADV_DONTFORK)  # a child is not watched by the node
    except (OSError, ValueError) as error:
        code = errno.errorcode.get(getattr(error, "errno", 0) or 0, "")
        raise NodeError(f"node: cannot map {format_size(size)} of the node's memory: {error} {code}".rstrip()) from None
    return mapping


class Extents:
    """Which runs of extents are free. A run is as many extents side by side as a namespace needs to waste little."""

    def __init__(self, size: int) -> None:
        low, high = _EXTENT_BYTES
        self.extent_bytes = whole_pages(max(low, min(high, size // _EXTENTS)))
        self.count = size // self.extent_bytes
        self._free = bytearray(b"\1" * self.count)

    @property
    def num_free(self) -> int:
        return sum(self._free)

    def run_for(self, stride: int) -> int:
        """Extents per run for slots of this many bytes. Raises ConfigError when no slot fits into the memory."""
        if stride > self.count * self.extent_bytes:
            total = format_size(self.count * self.extent_bytes)
            raise ConfigError(f"host.capacity {total} is less than one chunk of {format_size(stride)}; raise it")
        run = -(-stride // self.extent_bytes)
        while run < self.count and (run * self.extent_bytes) % stride * _MOST_WASTE > run * self.extent_bytes:
            run += 1
        return run

    def has(self, run: int) -> bool:
        """Whether there is a free run."""
        return b"\1" * run in self._free

    def take(self, run: int) -> int:
        """The first extent of a free run, or -1."""
        first = self._free.find(b"\1" * run)
        if first >= 0:
            self._free[first : first + run] = bytes(run)
        return first

    def stretch(self, first: int, run: int) -> int:
        """How many extents would be free side by side if this run was free, too."""
        before = first - (self._free.rfind(b"\0", 0, first) + 1)
        after = self._free.find(b"\0", first + run)
        return before + run + (self.count if after < 0 else after) - first - run

    def give_back(self, first: int, run: int) -> None:
        assert not any(self._free[first : first + run])
        self._free[first : first + run] = b"\1" * run


class Places:
    """Where the slots of one namespace are: a slot number of its directory, which counts through its runs, and a place in the memory."""

    def __init__(self, extents: Extents, rank_bytes: Sequence[int]) -> None:
        """rank_bytes: of a chunk, by rank. Raises ConfigError when not one fits."""
        self.parts = [0]
        for size in rank_bytes:
            self.parts.append(self.parts[-1] + whole_pages(size))
        self.stride = self.parts[-1]
        self._extents = extents
        self.run = extents.run_for(self.stride)
        self.per_run = self.run * extents.extent_bytes // self.stride
        self.most_slots = extents.count // self.run * self.per_run
        self._runs: list[int] = [-1] * (extents.count // self.run)  # first extent of each run that it has

    @property
    def num_extents(self) -> int:
        """Extents that it has."""
        return len(self.held()) * self.run

    @property
    def can_grow(self) -> bool:
        return -1 in self._runs and self._extents.has(self.run)

    def grow(self) -> range | None:
        """Take one more run. Returns its slots, or None if none is free."""
        index = next((index for index, first in enumerate(self._runs) if first < 0), None)
        if index is None:
            return None
        first = self._extents.take(self.run)
        if first < 0:
            return None
        self._runs[index] = first
        return self.slots_of(index)

    def give_back(self, index: int) -> None:
        """Nothing uses the run's slots any more."""
        self._extents.give_back(self._runs[index], self.run)
        self._runs[index] = -1

    def held(self) -> list[int]:
        """The numbers of the runs that it has."""
        return [index for index, first in enumerate(self._runs) if first >= 0]

    def best_to_give(self) -> int:
        """The run that is best given back: the one that leaves the longest stretch of free extents."""
        return max(self.held(), key=lambda index: self._extents.stretch(self._runs[index], self.run))

    def slots_of(self, index: int) -> range:
        return range(index * self.per_run, (index + 1) * self.per_run)

    def offset(self, slot: int) -> int:
        """Bytes from the start of the memory."""
        first = self._runs[slot // self.per_run]
        assert first >= 0, "a slot of a run that was given back"
        return first * self._extents.extent_bytes + slot % self.per_run * self.stride


class RankSlots:
    """The part of one rank in the slots of a namespace, for copies to and from the tiers below."""

    def __init__(self, memory: Memory, places: Places, index: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._memory = memory
        self._places = places
        self._part = places.parts[index]

    def view(self, slot: int) -> memoryview:
        start = self._places.offset(slot) + self._part
        return self._memory.bytes[start : start + self.slot_bytes].data
