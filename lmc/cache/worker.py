"""The worker: one rank's memory and tiers. It does what a plan says and reports; it decides nothing.

Copies between blocks and slots run on the engine's own thread, so an aborted request can never be written to later. Copies between slots
and the tiers below run on I/O threads, which touch nothing but slots.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np

from lmc.cache.keys import Namespace
from lmc.cache.layout import KVLayout
from lmc.cache.plan import Plan, Report, RequestCopies, TierCopy, WorkerReady
from lmc.cache.tiers.base import Tier
from lmc.cache.tiers.host import HostSlab
from lmc.cache.transfer.backends import Backend
from lmc.cache.transfer.planner import Direction, plan
from lmc.errors import TierError, TransferError

logger = logging.getLogger(__name__)


class CacheWorker:
    """Chunks of `blocks_per_chunk` blocks of `layout` between an engine's KV cache, a slab of host slots and tiers by name."""

    def __init__(
        self,
        namespace: Namespace,
        rank: int,
        layout: KVLayout,
        slab: HostSlab,
        tiers: Mapping[str, Tier],
        backend: Backend,
        *,
        io_threads: int,
        warnings: Sequence[str] = (),
    ) -> None:
        self._namespace = namespace
        self._rank = rank
        self._layout = layout
        self._slab = slab
        self._tiers = dict(tiers)
        self._backend = backend
        self._warnings = tuple(warnings)
        self._pool = ThreadPoolExecutor(io_threads, thread_name_prefix="lmc-io")
        self._lock = threading.Lock()  # guards the report, which I/O threads write to
        self._report = Report()
        self._failed_requests: dict[str, str] = {}  # of the plan under way
        self._failed_blocks: set[int] = set()

    def ready(self) -> WorkerReady:
        """What this rank holds. Scans the tiers below."""
        warnings = list(self._warnings)
        stored = {}
        for name, tier in self._tiers.items():
            try:
                stored[name] = [key for key, _ in tier.scan()]
            except TierError as error:
                warnings.append(str(error))
        return WorkerReady(
            self._namespace, self._rank, self._slab.slot_bytes, self._slab.num_slots, stored, tuple(warnings)
        )

    def begin(self, work: Plan) -> None:
        """Before the forward pass: start what runs in the background and fill the blocks that the pass reads."""
        self._failed_requests = {}
        self._failed_blocks.update(work.failed_blocks)
        for copy in work.tier_copies:
            self._pool.submit(self._copy_tier, copy).add_done_callback(partial(self._on_crash, copy))
        for request in work.loads:
            self._copy_blocks(request, Direction.LOAD)

    def end(self, work: Plan) -> None:
        """After the forward pass: copy the blocks that it filled. Requests whose load failed in this step are left out:
        they computed garbage."""
        for request in work.stores:
            cause = self._failed_requests.get(request.request_id)
            if cause is None:
                self._copy_blocks(request, Direction.STORE)
            else:
                self._finish([chunk.operation for chunk in request.chunks], f"the load before it failed: {cause}")

    def take_failed_blocks(self) -> set[int]:
        """Blocks that were promised and not filled, since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_report(self) -> Report:
        """What ended since the last call."""
        with self._lock:
            report, self._report = self._report, Report()
        return report

    def close(self, timeout: float = 10.0) -> None:
        """Drain the I/O threads within timeout seconds, then release memory and connections."""
        deadline = time.monotonic() + timeout
        self._pool.shutdown(wait=False)
        for thread in list(self._pool._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._pool._threads):
            logger.warning("lmc: closing with unfinished writes after %s s; those chunks are lost", timeout)
            return
        for tier in self._tiers.values():
            tier.close()
        self._slab.close()

    def _copy_blocks(self, request: RequestCopies, direction: Direction) -> None:
        blocks = np.array([block for chunk in request.chunks for block in chunk.blocks], dtype=np.int64)
        slots = np.array([self._slab.address(chunk.slot) for chunk in request.chunks], dtype=np.uint64)
        operations = [chunk.operation for chunk in request.chunks]
        started = time.perf_counter()
        try:
            descriptors = plan(self._layout, blocks, slots, direction)
            self._backend.execute(descriptors)
        except TransferError as error:
            logger.warning("lmc: %s of request %s failed: %s", direction, request.request_id, error)
            self._finish(operations, str(error))
            if direction is Direction.LOAD:
                self._failed_requests[request.request_id] = str(error)
                self._failed_blocks.update(int(block) for block in blocks if block >= 0)
            return
        self._finish(operations, None)
        self._measure(str(direction), descriptors.num_bytes, time.perf_counter() - started)

    def _copy_tier(self, copy: TierCopy) -> None:
        tier = self._tiers[copy.tier]
        view = self._slab.view(copy.slot) if copy.kind != "delete" else memoryview(b"")
        started = time.perf_counter()
        try:
            if copy.kind == "stage":
                tier.get(copy.key, view)
            else:
                for key in copy.evict:
                    tier.delete(key)
                if copy.kind == "write":
                    tier.put(copy.key, view)
                else:
                    tier.delete(copy.key)
        except KeyError:
            self._finish([copy.operation], f"{copy.tier} tier: absent")
        except TierError as error:
            logger.warning("lmc: %s of chunk %s failed: %s", copy.kind, copy.key.hex()[:16], error)
            self._finish([copy.operation], str(error))
        else:
            self._finish([copy.operation], None)
            self._measure(f"{copy.tier} {copy.kind}", len(view), time.perf_counter() - started)

    def _on_crash(self, copy: TierCopy, future: Future[None]) -> None:
        """A fault in lmc itself: say so, and let the operation end, so that its slot is free again."""
        error = None if future.cancelled() else future.exception()
        if error is not None:
            logger.error("lmc: %s of chunk %s crashed", copy.kind, copy.key.hex()[:16], exc_info=error)
            self._finish([copy.operation], f"{type(error).__name__}: {error}")

    def _finish(self, operations: Sequence[int], failure: str | None) -> None:
        with self._lock:
            self._report.finished.update(Counter(operations))
            if failure is not None:
                self._report.failed.update(dict.fromkeys(operations, failure))

    def _measure(self, what: str, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self._report.transfers.append((what, num_bytes, seconds))
