"""The host slots of a worker that is attached to a node: a mapping of the node's memory, which comes and goes with the node."""

from __future__ import annotations

import logging
import mmap
import threading

import numpy as np
import numpy.typing as npt

from lmc.cache.node.memory import map_memory
from lmc.cache.transfer.pinned import PIECE_BYTES, Registrar, Slab, open_registrar, touch
from lmc.errors import CaptureError, TransferError
from lmc.units import format_size

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 0.05


class NodeSlab(Slab):
    """A slot's number counts in units from the start of the memory, and a slot holds the parts of all ranks side by side.

    Between unmap() and map() it has no slots, so a copy fails; whoever calls them must know that no copy is under way.
    """

    def __init__(self, slot_bytes: int, device: str) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = 0
        self.problem = ""
        self.base = 0
        self.slot_stride = mmap.PAGESIZE
        self.pinned_slots = 0
        self.boundaries = np.array([], dtype=np.uint64)
        self._registrar: Registrar | None = None
        try:
            self._registrar, _ = open_registrar(device)
        except TransferError as error:
            self.degrade(f"all slots stay pageable: {error}")
        self._all_parts = slot_bytes  # bytes of a slot with the parts of all ranks
        self._pinned_end = 0  # addresses below it are registered
        self._pieces: list[int] = []  # addresses of those that are registered
        self._mapping: mmap.mmap | None = None
        self._closing = threading.Event()
        self._preparing: threading.Thread | None = None

    def map(self, descriptor: int, size: int, unit: int, part: int, slot_bytes: int) -> None:
        """part: where this rank's bytes are in a slot; slot_bytes: of all ranks. Raises NodeError if the memory cannot be mapped."""
        mapping = map_memory(descriptor, size)
        view = np.frombuffer(mapping, dtype=np.uint8)
        start = view.ctypes.data
        self._mapping, self._all_parts = mapping, slot_bytes
        self._bytes = view[part:]
        self.base, self.slot_stride = start + part, unit
        self.num_slots = max(0, (size - slot_bytes) // unit + 1)
        pieces = range(PIECE_BYTES, size, PIECE_BYTES) if self._registrar is not None else ()
        self.boundaries = np.array([start + at for at in pieces], dtype=np.uint64)
        self._closing = threading.Event()
        self._preparing = threading.Thread(target=self._prepare, args=(start, size), name="lmc-node-slab", daemon=True)
        self._preparing.start()

    def unmap(self) -> bool:
        """Whoever calls knows that no copy touches the memory. False if something else still refers to it, so that it stays mapped."""
        if self._mapping is None:
            return True
        self._closing.set()
        assert self._preparing is not None
        self._preparing.join()
        self.num_slots = self.pinned_slots = self._pinned_end = 0
        for address in self._pieces:
            assert self._registrar is not None
            try:
                self._registrar.unregister(address)
            except TransferError as error:
                logger.warning("lmc: node: %s", error)
        self._pieces.clear()
        self.boundaries = np.array([], dtype=np.uint64)
        del self._bytes
        mapping, self._mapping = self._mapping, None
        try:
            mapping.close()
        except BufferError:
            return False
        return True

    def is_pinned(self, addresses: npt.NDArray[np.uint64]) -> bool:
        return bool((addresses < self._pinned_end).all())

    def close(self) -> None:
        self.unmap()

    def _prepare(self, start: int, size: int) -> None:
        """Have the pages mapped, and registered with the device's driver, piece by piece."""
        pinning = self._registrar is not None
        for first in range(0, size, PIECE_BYTES):
            piece = min(PIECE_BYTES, size - first)
            touch(start + first, piece, self._closing)
            if self._closing.is_set():
                return
            if pinning:
                pinning = self._register(start + first, piece, first + piece)

    def _register(self, address: int, size: int, end: int) -> bool:
        assert self._registrar is not None
        while True:
            try:
                self._registrar.register(address, size)
            except CaptureError:
                if self._closing.wait(_RETRY_SECONDS):
                    return False
            except TransferError as error:
                self.degrade(f"of the node's memory, all beyond {format_size(end - size)} stays pageable: {error}")
                return False
            else:
                self._pieces.append(address)
                self._pinned_end = address + size
                self.pinned_slots = end // self._all_parts  # about so many
                return True
