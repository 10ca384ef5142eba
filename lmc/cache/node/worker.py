"""The worker's half of an engine that is attached to a node: it copies between blocks and the node's memory, and has no tier of its own.

A thread holds the connection. When the node has gone, it waits for the copies under way, unmaps the memory and looks for the next node.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import lmc.cache.node.wire as wire
from lmc.cache.config import CacheConfig
from lmc.cache.keys import Element, Namespace
from lmc.cache.node.channel import Channel, connect
from lmc.cache.node.link import LONGEST_PAUSE, SHORTEST_PAUSE, Complaints
from lmc.cache.node.memory import whole_pages
from lmc.cache.node.slab import NodeSlab
from lmc.cache.plan import COPY, SKIP, CopyReading, Plan, Report, WorkerReady, operations_of
from lmc.cache.tiers.codec import element_of
from lmc.cache.transfer.backends import choose_backend
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.transfer.planner import slot_bytes
from lmc.cache.worker.block_copies import BlockCopier
from lmc.cache.worker.open import open_streams
from lmc.cache.worker.worker import CacheWorker, read_copying
from lmc.errors import ConfigError, NodeError

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
FIRST_SECONDS = 5.0  # that a start waits for the memory


class _Guard:
    """Held by whoever copies (`with guard`), by any number of threads, or by who changes the memory (`with guard.alone()`).

    Plans that are kept count as copies until the worker closes.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._copying = 0
        self._kept = 0
        self._closing = False

    def __enter__(self) -> None:
        with self._changed:
            self._copying += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._copying -= 1
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._copying and (self._closing or not self._kept))
            yield

    def keep(self, number: int) -> None:
        with self._changed:
            self._kept += number
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()


class NodeWorker(CacheWorker):
    """It carries a plan out only if the memory that the plan speaks of is the one that it has mapped."""

    def __init__(
        self,
        namespace: Namespace,
        rank: int,
        ranks: Sequence[int],
        slab: NodeSlab,
        copier: BlockCopier,
        copying: Callable[[], CopyReading],
        path: Path,
        element: Element,
    ) -> None:
        super().__init__(namespace, rank, slab, copier, {}, copying, part=rank, io_threads={})
        self._number = secrets.token_bytes(wire.ID_BYTES)
        self._memory = ""  # the node whose memory is mapped
        self._node_slab = slab
        self._path = path
        self._element = element
        self._position = ranks.index(rank)
        self._num_parts = len(ranks)
        self._guard = _Guard()
        self._closing = threading.Event()
        self._tried = threading.Event()
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._stay_attached, name="lmc-node-worker", daemon=True)
        self._thread.start()

    def ready(self) -> WorkerReady:
        """Waits a moment for the node, so that the scheduler's half finds the memory mapped."""
        self._tried.wait(FIRST_SECONDS)
        return replace(super().ready(), mapping=self._number.hex(), element=self._element)

    def begin(self, work: Plan, *, by_layer: bool = False) -> None:
        with self._guard:
            super().begin(self._of_this_memory(work), by_layer=by_layer)

    def wait_layer(self, name: str) -> None:
        with self._guard:
            super().wait_layer(name)

    def end(self, work: Plan) -> None:
        with self._guard:
            if self._is_stale(work) and work.stores:
                self.give_up(operations_of(work.stores), COPY)
                work = replace(work, stores=[])
            super().end(work)

    def keep(self, work: Plan) -> bool:
        """The memory stays mapped until release(), also when the node has gone: nobody else writes to the slots of loads."""
        with self._guard:
            if self._is_stale(work):
                return False
            self._guard.keep(1)
            return True

    def release(self) -> None:
        self._guard.keep(-1)

    def fence(self, overwritten: Set[int] | None = None) -> None:
        with self._guard:
            super().fence(overwritten)

    def detach(self) -> None:
        with self._guard:
            super().detach()

    def attach(self) -> None:
        with self._guard:
            super().attach()

    def take_failed_blocks(self) -> set[int]:
        with self._guard:
            return super().take_failed_blocks()

    def take_loaded(self) -> set[str]:
        with self._guard:
            return super().take_loaded()

    def take_report(self) -> Report:
        with self._guard:
            return super().take_report()

    def close(self, timeout: float | None = None) -> None:
        self._closing.set()
        self._guard.close()
        os.write(self._stop_write, b"x")
        self._thread.join()
        os.close(self._stop_read)
        os.close(self._stop_write)
        super().close(timeout)

    def _is_stale(self, work: Plan) -> bool:
        return work.memory != self._memory

    def _of_this_memory(self, work: Plan) -> Plan:
        """The plan without copies between blocks and a memory that is not mapped; loads among them fail."""
        if not self._is_stale(work) or not (work.loads or work.background_loads):
            return work
        lost = [*work.loads, *work.background_loads]
        self.give_up(operations_of(lost), COPY)
        blocks = [block for request in lost for chunk in request.chunks for block in chunk.blocks if block != SKIP]
        return replace(
            work,
            loads=[],
            background_loads=[],
            failed_blocks=[*work.failed_blocks, *blocks],
            failed_requests=[*work.failed_requests, *(request.request_id for request in work.background_loads)],
        )

    # On the thread

    def _stay_attached(self) -> None:
        self.copier.own_thread()
        pause = SHORTEST_PAUSE
        complaints = Complaints(f"rank {self._rank} runs without a cache until the node is there")
        while not self._closing.is_set():
            try:
                self._attach_once()
                complaints.succeeded()
                pause = SHORTEST_PAUSE
            except NodeError as error:
                complaints.note(error, pause)
            self._tried.set()
            self._closing.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _attach_once(self) -> None:
        """Map the node's memory, and stay until the node has gone or the worker closes. Raises NodeError if it cannot be mapped."""
        channel = connect(str(self._path), ANSWER_SECONDS, takes_descriptor=True)
        try:
            self._map(channel)
            self._tried.set()
            _wait_for_end(channel, self._stop_read)
            if self._unmap():
                with suppress(NodeError):  # it has gone itself
                    channel.put(wire.Left())
        finally:
            channel.close()

    def _map(self, channel: Channel) -> None:
        answer = wire.read(wire.welcomes, channel.ask(wire.TakeMemory(self._number, self._rank), ANSWER_SECONDS))
        if isinstance(answer, wire.Refused):
            raise NodeError(f"node: {answer.reason}")
        if not isinstance(answer, wire.Memory) or channel.descriptor < 0:
            raise NodeError("node: the node sent no memory")
        stride = whole_pages(self._node_slab.slot_bytes)
        with self._guard.alone():
            self._node_slab.map(
                channel.descriptor, answer.size, answer.unit, self._position * stride, self._num_parts * stride
            )
            self._memory = answer.node.hex()
        channel.close_descriptor()
        try:
            channel.put(wire.Taken())
        except NodeError:
            self._unmap()
            raise
        logger.info("lmc: rank %d has mapped the memory of the node", self._rank)

    def _unmap(self) -> bool:
        """Let the copies under way end, and give the memory up. False if it stays mapped after all."""
        self._memory = ""  # from now on every plan that names a node is stale
        with self._guard.alone():
            self.copier.finish_copies()
        return self._node_slab.unmap()  # it takes seconds


def open_node_worker(
    config: CacheConfig, namespace: Namespace, layout: KVLayout, *, rank: int, ranks: Sequence[int]
) -> NodeWorker:
    """A worker that maps the memory of the node at config.node, now or when the node is there. ranks: of the engine's workers.

    Raises ConfigError if they are not all on this machine.
    """
    assert config.node is not None
    if rank not in ranks:
        raise ConfigError("node: all ranks of an engine must run on the node's machine; leave the setting out")
    chunk_bytes = slot_bytes(layout, namespace.chunk_tokens // layout.block_tokens)
    slab = NodeSlab(chunk_bytes, layout.device)
    backend = choose_backend(layout, name=config.transfer_backend, is_pinned=slab.is_pinned)
    on_thread_bytes = -(-config.background_load_tokens // layout.block_tokens) * layout.block_bytes
    streams = open_streams(layout.device, backend)
    copier = BlockCopier(layout, slab, backend, streams, on_thread_bytes=on_thread_bytes)
    element = element_of(layout.dtypes, namespace.kv_dtype)
    return NodeWorker(namespace, rank, ranks, slab, copier, partial(read_copying, backend, slab), config.node, element)


def _wait_for_end(channel: Channel, stop: int) -> None:
    """Until the node has gone, or somebody writes to the descriptor."""
    poll = select.poll()
    poll.register(channel, select.POLLIN | select.POLLRDHUP)
    poll.register(stop, select.POLLIN)
    while True:
        for number, _ in poll.poll():
            if number == stop:
                return
            try:
                channel.take()
            except NodeError:
                return
