"""Copies between the engine's blocks and host slots: planned, given to the transfer backend, and settled when they ended.

On a CPU a copy is done when the call returns; loads for requests outside the batch run on a thread. On a device copies are queued on
streams behind the engine's kernels, and what the engine launches later waits for them there, not on the host.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lmc.cache.layout import KVLayout
from lmc.cache.plan import RequestCopies
from lmc.cache.transfer.backends import Backend
from lmc.cache.transfer.pinned import Slab
from lmc.cache.transfer.planner import Descriptors, Direction, plan
from lmc.cache.transfer.streams import TransferStreams

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class BlockBatch:
    """The copies of one request in one step, and how they ended."""

    request_id: str
    operations: tuple[int, ...]
    blocks: tuple[int, ...]  # those copied
    direction: Direction
    background: bool
    failed: bool = False
    num_bytes: int = 0
    seconds: float = 0.0


class BlockCopier:
    """The engine's thread calls; ended() gives each batch back exactly once."""

    def __init__(self, layout: KVLayout, slab: Slab, backend: Backend, streams: TransferStreams | None = None) -> None:
        """streams: of the layout's device; none where copies are done when the backend returns."""
        self.layout = layout
        self._slab = slab
        self.backend = backend
        self._streams = streams
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="lmc-load")
        self._ended: deque[BlockBatch] = deque()

    def load(self, request: RequestCopies) -> bool:
        """Fill blocks that the next forward pass reads; what the engine launches from now on sees them. False if that failed."""
        batch = _batch(request, Direction.LOAD)
        if self._streams is None:
            self._copy(batch, request)
            return not batch.failed
        descriptors = self._plan(batch, request)
        if descriptors is not None:
            transfer = self._streams.submit(descriptors, batch)
            self._streams.wait(transfer)
            batch.failed = transfer.error is not None
        return not batch.failed

    def load_in_background(self, request: RequestCopies) -> None:
        """Fill blocks of a request that is in no batch until the load has ended."""
        batch = _batch(request, Direction.LOAD, background=True)
        if self._streams is None:
            self._loader.submit(self._copy, batch, request)
            return
        descriptors = self._plan(batch, request)
        if descriptors is not None:
            self._streams.submit(descriptors, batch)

    def store(self, request: RequestCopies) -> None:
        """Copy blocks that the last forward pass filled."""
        batch = _batch(request, Direction.STORE)
        if self._streams is None:
            self._copy(batch, request)
            return
        descriptors = self._plan(batch, request)
        if descriptors is not None:
            self._streams.submit(descriptors, batch)

    def fence(self) -> None:
        """What the engine launches from now on may overwrite any block: stores under way have read theirs before it starts."""
        if self._streams is not None:
            self._streams.fence(Direction.STORE)

    def ended(self) -> list[BlockBatch]:
        """Batches that ended since the last call."""
        if self._streams is not None:
            for transfer in self._streams.finished():
                batch = transfer.tag
                assert isinstance(batch, BlockBatch)
                batch.failed = transfer.error is not None
                batch.seconds = transfer.seconds
                if batch.failed:
                    logger.error("lmc: %s of request %s failed: %s", batch.direction, batch.request_id, transfer.error)
                self._ended.append(batch)
        found = []
        while self._ended:
            found.append(self._ended.popleft())
        return found

    def close(self) -> None:
        """Wait for what is under way."""
        self._loader.shutdown(wait=True)
        if self._streams is not None:
            self._streams.drain()

    def _copy(self, batch: BlockBatch, request: RequestCopies) -> None:
        """Plan and copy now; on the loader's thread for loads in the background."""
        started = time.perf_counter()
        descriptors = self._plan(batch, request)
        if descriptors is None:
            return
        try:
            self.backend.execute(descriptors)
        except Exception:  # whatever goes wrong here, the answer is recomputation
            logger.exception("lmc: %s of request %s failed", batch.direction, batch.request_id)
            batch.failed = True
        batch.seconds = time.perf_counter() - started
        self._ended.append(batch)

    def _plan(self, batch: BlockBatch, request: RequestCopies) -> Descriptors | None:
        """None when that failed; the batch has then ended."""
        try:
            descriptors = plan(
                self.layout,
                np.array([block for chunk in request.chunks for block in chunk.blocks], dtype=np.int64),
                np.array([self._slab.address(chunk.slot) for chunk in request.chunks], dtype=np.uint64),
                batch.direction,
                boundaries=self._slab.boundaries,
            )
        except Exception:  # as above
            logger.exception("lmc: %s of request %s cannot be planned", batch.direction, batch.request_id)
            batch.failed = True
            self._ended.append(batch)
            return None
        batch.num_bytes = descriptors.num_bytes
        return descriptors


def _batch(request: RequestCopies, direction: Direction, background: bool = False) -> BlockBatch:
    chunks = request.chunks
    return BlockBatch(
        request.request_id,
        tuple(chunk.operation for chunk in chunks),
        tuple(block for chunk in chunks for block in chunk.blocks if block >= 0),
        direction,
        background,
    )
