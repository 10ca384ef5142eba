"""Copies between the engine's blocks and host slots: made into descriptors, given to the transfer backend, and settled when they ended.

On a CPU a copy is done when the call returns; long loads for requests outside the batch run on a thread. On a device copies are queued on
streams behind the engine's kernels, and what the engine launches later waits for them there, not on the host. Loads go layer by layer
where the engine can wait for one layer: the first attention need not wait for the last layer's bytes.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmc.cache.plan import BlockCopy, RequestCopies, request_name
from lmc.cache.transfer.backends import Backend
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.transfer.pinned import Slab
from lmc.cache.transfer.planner import Addresses, Descriptors, Direction, join, plan, plan_layers
from lmc.cache.transfer.streams import Transfer, TransferStreams
from lmc.errors import TransferError

logger = logging.getLogger(__name__)

LAYER_BYTES = 1 << 20  # the copies of a smaller layer are over about as soon as the next layer's can be queued


@dataclass(eq=False)
class BlockBatch:
    """The copies of one request in one step, and how they ended."""

    request_id: str
    operations: tuple[int, ...]
    blocks: tuple[int, ...]  # those copied
    direction: Direction
    background: bool
    num_bytes: int
    failed: bool = False
    seconds: float = 0.0


@dataclass(eq=False)
class _Layers:
    """The loads of the next forward pass."""

    blocks: set[int]
    transfer: Transfer | None  # None: they could not be planned
    missing: set[int]  # layers that the pass has not waited for


class BlockCopier:
    """Called on the engine's thread. ended() returns each batch exactly once."""

    def __init__(
        self,
        layout: KVLayout,
        slab: Slab,
        backend: Backend,
        streams: TransferStreams | None = None,
        *,
        on_thread_bytes: int = 0,
        others: Sequence[KVLayout] = (),
    ) -> None:
        """streams: those of the layout's device; None if copies are done when the backend returns.

        on_thread_bytes: without streams, loads in the background from this size on run on a thread, and smaller ones at once.
        others: the layouts of further groups.
        """
        self.layout = layout
        self._layouts = (layout, *others)
        self._slab = slab
        self.backend = backend
        self._streams = streams
        self._on_thread_bytes = on_thread_bytes
        self._loader = start_thread("lmc-load")
        self._ended: deque[BlockBatch] = deque()
        self._layers: _Layers | None = None
        self._layer_of = {name: index for index, layer in enumerate(layout.layers) for name in layer.names}
        self._by_layer = layout.layers_apart and not others
        self._detached = False

    def load(self, request: RequestCopies) -> bool:
        """Fill blocks that the next forward pass reads: kernels launched from now on see the bytes. False if that failed."""
        batch = self._batch(request, Direction.LOAD)
        if self._streams is None:
            self._copy(batch, request)
            return not batch.failed
        planned = self._plan([batch], [request])
        if planned is None:
            return False
        transfer = self._streams.submit(planned[0], [batch])
        self._streams.wait(transfer)
        return transfer.error is None

    def start_layers(self, requests: Sequence[RequestCopies]) -> bool:
        """Queue what load() would copy for these requests, layer by layer; wait_layer() follows for each layer, then end_layers().

        Returns False and queues nothing if that gains nothing: if copies are done at once, if blocks hold all layers together, or
        if there is little to copy.
        """
        if self._streams is None or not self._by_layer:
            return False
        batches = [self._batch(request, Direction.LOAD) for request in requests]
        num_layers = len(self.layout.layers)
        if sum(batch.num_bytes for batch in batches) < LAYER_BYTES * num_layers:
            return False
        parts = self._plan(batches, requests, by_layer=True)
        transfer = self._streams.submit_layers(parts, batches) if parts is not None else None
        blocks = {block for batch in batches for block in batch.blocks}
        self._layers = _Layers(blocks, transfer, set(range(num_layers)) if transfer is not None else set())
        return True

    def wait_layer(self, name: str) -> None:
        """Kernels launched from now on see the blocks of this layer that start_layers() was asked for."""
        layers, index = self._layers, self._layer_of.get(name)
        if layers is None or layers.transfer is None or index is None:
            return
        assert self._streams is not None
        self._streams.wait_layer(layers.transfer, index)
        layers.missing.discard(index)

    def end_layers(self) -> set[int]:
        """Call after the forward pass. Returns the blocks that were not filled when the pass read them."""
        layers, self._layers = self._layers, None
        if layers is None:
            return set()
        if layers.transfer is None:
            return layers.blocks
        assert self._streams is not None
        self._streams.wait(layers.transfer)
        if layers.missing:
            self._by_layer = False
            name = self.layout.layers[min(layers.missing)].names[0]
            logger.error(
                "lmc: the engine ran layer %s without waiting for it; from now on loads end before the pass", name
            )
        return layers.blocks if layers.missing or layers.transfer.error is not None else set()

    def load_each_layer(self, requests: Sequence[RequestCopies], arrived: Callable[[int], None]) -> bool:
        """Fill blocks on the calling thread, which may be any. Calls arrived(layer) when a layer's bytes are in place.

        False if that failed.
        """
        batches = [self._batch(request, Direction.LOAD) for request in requests]
        started = time.perf_counter()
        parts = self._plan(batches, requests, by_layer=True)
        if parts is None:
            return False
        try:
            for layer, descriptors in enumerate(parts):
                self.backend.execute(descriptors)
                arrived(layer)
        except Exception:  # whatever goes wrong here, the answer is recomputation
            logger.exception("lmc: a load of %d requests failed", len(requests))
            for batch in batches:
                batch.failed = True
        _share_out(time.perf_counter() - started, batches)
        self._ended.extend(batches)
        return not any(batch.failed for batch in batches)

    def load_in_background(self, request: RequestCopies) -> None:
        """Fill blocks for a request that joins no batch until the load has ended.

        On a CPU a small load is over when this returns: it would share the cores with whatever runs beside it, so nothing would be
        gained, and its request would join a later batch.
        """
        batch = self._batch(request, Direction.LOAD, background=True)
        if self._streams is not None:
            self._submit(batch, request)
        elif batch.num_bytes < self._on_thread_bytes:
            self._copy(batch, request)
        else:
            self._loader.submit(self._copy, batch, request)

    def store(self, request: RequestCopies) -> None:
        """Copy blocks that the last forward pass filled."""
        batch = self._batch(request, Direction.STORE)
        if self._streams is None:
            self._copy(batch, request)
        else:
            self._submit(batch, request)

    def fence(self, overwritten: Set[int] | None = None) -> None:
        """What the engine launches from now on may overwrite these blocks, or any: stores under way have read them before it starts.

        A store of other blocks goes on beside it.
        """
        if self._streams is None:
            return
        for transfer in reversed(self._streams.pending(Direction.STORE)):
            if overwritten is None or any(not overwritten.isdisjoint(batch.blocks) for batch in _batches(transfer)):
                self._streams.wait(transfer)  # those before it end before it
                return

    def own_thread(self) -> None:
        """Of a thread of lmc's that copies, before its first copy."""
        if self._streams is not None:
            self._streams.own_thread()

    def drain(self) -> None:
        """Wait until no block is read or written by a copy that was started; ended() then gives their batches back."""
        if self._streams is not None:
            self._note_ended(self._streams.drain())

    def detach(self) -> None:
        """The engine's KV memory goes away: wait for the copies under way. Until attach() every other one fails at once."""
        self.finish_copies()
        self._detached = True

    def finish_copies(self) -> None:
        """Wait for every copy under way, those in the background too. It may follow close(), on another thread, too."""
        try:
            last = self._loader.submit(int)
        except RuntimeError:  # it is closed, and takes nothing more
            self._loader.shutdown(wait=True)
        else:
            last.result()
        self.drain()

    def attach(self) -> None:
        """The memory is back, at the same addresses."""
        self._detached = False

    def ended(self) -> list[BlockBatch]:
        """Batches that ended since the last call."""
        if self._streams is not None:
            self._note_ended(self._streams.finished())
        found = []
        while self._ended:
            found.append(self._ended.popleft())
        return found

    def close(self) -> None:
        """Wait for the copies under way."""
        self._loader.shutdown(wait=True)
        self.drain()

    def _note_ended(self, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            batches = _batches(transfer)
            _share_out(transfer.seconds, batches)
            for batch in batches:
                batch.failed = transfer.error is not None
                if batch.failed:
                    logger.error(
                        "lmc: %s of request %s failed: %s",
                        batch.direction,
                        request_name(batch.request_id),
                        transfer.error,
                    )
                self._ended.append(batch)

    def _submit(self, batch: BlockBatch, request: RequestCopies) -> None:
        assert self._streams is not None
        planned = self._plan([batch], [request])
        if planned is not None:
            self._streams.submit(planned[0], [batch])

    def _copy(self, batch: BlockBatch, request: RequestCopies) -> None:
        """Make descriptors and copy now. Loads in the background call it on the loader's thread."""
        started = time.perf_counter()
        planned = self._plan([batch], [request])
        if planned is None:
            return
        try:
            self.backend.execute(planned[0])
        except Exception:  # as above
            batch.failed = True
            logger.exception("lmc: %s of request %s failed", batch.direction, request_name(batch.request_id))
        finally:
            batch.seconds = time.perf_counter() - started
            self._ended.append(batch)

    def _plan(
        self, batches: Sequence[BlockBatch], requests: Sequence[RequestCopies], *, by_layer: bool = False
    ) -> list[Descriptors] | None:
        """The descriptors of all batches, in one part or in one part per layer. None if that failed; then the batches have ended."""
        chunks = [chunk for request in requests for chunk in request.chunks]
        try:
            if self._detached:
                raise TransferError("the engine's KV memory is away while it sleeps")
            if len(self._layouts) > 1:
                return [self._plan_groups(chunks, batches[0].direction)]
            blocks, slots = self._places(chunks)
            edges = self._slab.boundaries
            if by_layer:
                return plan_layers(self.layout, blocks, slots, batches[0].direction, boundaries=edges)
            return [plan(self.layout, blocks, slots, batches[0].direction, boundaries=edges)]
        except Exception:  # as above
            logger.exception(
                "lmc: %s of request %s cannot be planned", batches[0].direction, request_name(batches[0].request_id)
            )
            for batch in batches:
                batch.failed = True
            self._ended.extend(batches)
            return None

    def _plan_groups(self, chunks: Sequence[BlockCopy], direction: Direction) -> Descriptors:
        """The copies of parts of several groups. A block belongs to one group at a time, so no two of them may name the same."""
        for named in (
            [block for chunk in chunks for block in chunk.blocks if block >= 0],
            [one.slot for one in chunks],
        ):
            if len(set(named)) < len(named):
                raise TransferError("two groups would copy one block, or to one slot")
        planned = []
        for group, layout in enumerate(self._layouts):
            own = [chunk for chunk in chunks if chunk.group == group]
            if own:
                blocks, slots = self._places(own)
                planned.append(plan(layout, blocks, slots, direction, boundaries=self._slab.boundaries))
        return join(planned, direction)

    def _places(self, chunks: Sequence[BlockCopy]) -> tuple[npt.NDArray[np.int64], Addresses]:
        """Blocks and slots, for the planner."""
        blocks = np.array([block for chunk in chunks for block in chunk.blocks], dtype=np.int64)
        return blocks, _addresses(self._slab, np.array([chunk.slot for chunk in chunks], dtype=np.int64))

    def _batch(self, request: RequestCopies, direction: Direction, background: bool = False) -> BlockBatch:
        chunks = request.chunks
        blocks = tuple(block for chunk in chunks for block in chunk.blocks if block >= 0)
        operations = tuple(chunk.operation for chunk in chunks)
        num_bytes = len(blocks) * self.layout.block_bytes
        if len(self._layouts) > 1:
            num_bytes = sum(
                self._layouts[chunk.group].block_bytes * sum(block >= 0 for block in chunk.blocks) for chunk in chunks
            )
        return BlockBatch(request.request_id, operations, blocks, direction, background, num_bytes)


def start_thread(name: str, begin: Callable[[], None] = lambda: None) -> ThreadPoolExecutor:
    """A pool of one thread, which runs already: a machine that has no thread to give says so here, and not at the first job.

    A pool that cannot start its thread keeps the job all the same, and would run it after its copy has been given up. Raises RuntimeError.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=begin)
    pool.submit(int).result()
    return pool


def _addresses(slab: Slab, slots: npt.NDArray[np.int64]) -> Addresses:
    """Where slots start. Raises TransferError for one that does not exist."""
    if slots.size and not (slots.min() >= 0 and slots.max() < slab.num_slots):
        raise TransferError(f"a slot from {slots.min()} to {slots.max()} does not exist; there are {slab.num_slots}")
    return (slab.base + slots * slab.slot_stride).astype(np.uint64)


def _batches(transfer: Transfer) -> list[BlockBatch]:
    assert isinstance(transfer.tag, list)
    return transfer.tag


def _share_out(seconds: float, batches: Sequence[BlockBatch]) -> None:
    """Divide the time between batches that were copied together, in proportion to their bytes."""
    total = sum(batch.num_bytes for batch in batches)
    for batch in batches:
        batch.seconds = seconds * batch.num_bytes / total if total else seconds
