"""The worker: one rank's memory and tiers. It carries out plans and reports; it takes no decision.

Copies between blocks and slots are the BlockCopier's; their outcomes are noted on the engine's thread. Copies between slots and the tiers
below are the TierCopier's; its threads touch nothing but slots.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial

from lmc.cache.keys import ChunkKey, Namespace
from lmc.cache.plan import (
    CAUSES,
    COPY,
    CRASH,
    BreakerReading,
    CodecRun,
    CopyReading,
    Plan,
    Report,
    TierCopy,
    WorkerReady,
)
from lmc.cache.tiers.breaker import DIRECTIONS, BoundedBreaker, Breaker
from lmc.cache.tiers.format import stored_bytes
from lmc.cache.tiers.late import TierHangs, wait_for
from lmc.cache.tiers.stored import Moved
from lmc.cache.transfer.backends.auto import AutoBackend
from lmc.cache.transfer.pinned import Slab
from lmc.cache.transfer.planner import Direction
from lmc.cache.worker.block_copies import BlockCopier
from lmc.cache.worker.tier_copies import TierCopier
from lmc.errors import TierError

logger = logging.getLogger(__name__)

WRITE_NICENESS = 10  # a tenth of the weight of an ordinary thread: enough to get on when the machine is full


class CacheWorker:
    """Moves chunks between an engine's KV cache (through the copier), a slab of host slots, and tiers by name.

    io_threads: number of read threads, and number of write threads, by tier. part: see WorkerReady; if it is None, the slab is memory of
    another rank, who fills it, and tiers is empty.
    """

    def __init__(
        self,
        namespace: Namespace,
        rank: int,
        slab: Slab,
        copier: BlockCopier,
        tiers: Mapping[str, Breaker],
        copying: Callable[[], CopyReading],
        *,
        part: int | None,
        io_threads: Mapping[str, int],
        close_timeout: float = 10.0,
        warnings: Sequence[str] = (),
        part_bytes: Sequence[int] = (),
    ) -> None:
        """part_bytes: of a part of each group, if there are several."""
        self._namespace = namespace
        self._rank = rank
        self._part = part
        self._slab = slab
        self.copier = copier
        self._tiers = dict(tiers)
        self._read_copying = copying
        self._copying = copying()  # as last told
        self._warnings = tuple(warnings)
        self._close_timeout = close_timeout
        self._part_bytes = tuple(part_bytes)
        self._tier_copies = TierCopier(
            tiers,
            slab,
            rank,
            io_threads=io_threads,
            finish=self._finish,
            measure=self._measure,
            moved=self._note_moved,
            part_bytes=part_bytes,
        )
        self._lock = threading.Lock()  # guards the report, which other threads write to
        self._report = Report()
        self._failed_blocks: set[int] = set()
        self._loaded: set[str] = set()
        self._failed_requests: set[str] = set()
        self._fault = 0  # forward passes that ran on unfilled blocks

    def ready(self) -> WorkerReady:
        """Message of what this rank holds. It scans the bounded tiers."""
        scan = scan_tiers(self._tiers)
        return WorkerReady(
            self._namespace,
            self._rank,
            self._slab.slot_bytes,
            self._slab.num_slots,
            scan.stored,
            self._copying,
            tuple(name for name, tier in self._tiers.items() if not isinstance(tier, BoundedBreaker)),
            (*self._warnings, *scan.warnings),
            scan.parents,
            self._part,
            part_bytes=self._part_bytes,
        )

    def begin(self, work: Plan, *, by_layer: bool = False) -> None:
        """Call before the forward pass. Starts background copies and fills the blocks that the pass reads.

        by_layer: the pass will call wait_layer() before each layer reads its blocks, so loads may still be under way when this returns.
        """
        self._loaded.update(work.failed_requests)
        self._failed_requests.update(work.failed_requests)
        if self._part is not None:
            for copy in work.tier_copies:
                self._tier_copies.begin(copy)
        else:  # that rank's report counts
            self._finish([copy.ticket.operation for copy in work.tier_copies], None)
        for request in work.background_loads:
            self.copier.load_in_background(request)
        unfilled = set(work.failed_blocks)
        if not (by_layer and self.copier.start_layers(work.loads)):
            for request in work.loads:
                if not self.copier.load(request):
                    unfilled.update(block for chunk in request.chunks for block in chunk.blocks if block >= 0)
        self._note_unfilled(unfilled)

    def wait_layer(self, name: str) -> None:
        """Call before a layer of the forward pass reads its blocks."""
        self.copier.wait_layer(name)

    def end(self, work: Plan) -> None:
        """Call after the forward pass. Copies the blocks that the pass filled.

        If a pass ran on blocks that were not filled, all that it computed is garbage, also for other requests that share the blocks. So are
        the results of passes that were scheduled before the scheduler knew. None of them is stored.
        """
        self._note_unfilled(self.copier.end_layers())
        poisoned = work.known_faults.get(self._rank, 0) < self._fault
        for request in work.stores:
            if poisoned or self._part is None:  # if its pass was garbage, so are the bytes of the rank that stores
                self._finish([chunk.operation for chunk in request.chunks], COPY if poisoned else None)
            else:
                self.copier.store(request)

    def keep(self, work: Plan) -> bool:
        """Whoever carries the loads of a plan out later, copying by itself, calls this before, and release() when that is over.

        False: they cannot be carried out.
        """
        return True

    def release(self) -> None:
        """A plan that was kept is carried out, or will not be."""

    def fence(self, overwritten: Set[int] | None = None) -> None:
        """Before the engine launches anything that may overwrite these blocks of earlier steps, or any of them."""
        self.copier.fence(overwritten)

    def detach(self) -> None:
        """The engine is about to sleep and its KV memory to go: when this returns, no copy touches a block. Host slots and tiers stay."""
        self.copier.detach()

    def attach(self) -> None:
        """The engine is awake, its KV memory back at the same addresses."""
        self.copier.attach()

    def take_failed_blocks(self) -> set[int]:
        """Blocks that were promised but not filled, since the last call."""
        self._settle()
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_loaded(self) -> set[str]:
        """Requests whose background load ended or failed since the last call. Call take_failed_blocks() after this, not before."""
        self._settle()
        loaded, self._loaded = self._loaded, set()
        return loaded

    def take_failed_requests(self) -> set[str]:
        """Those of the requests of the last take_loaded() whose load failed."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_report(self) -> Report:
        """Report of the operations that ended since the last call."""
        self._settle()
        stuck = self._tier_copies.settle() if self._tiers else set()
        with self._lock:
            report, self._report = self._report, Report()
        report.stuck = stuck
        for name, tier in self._tiers.items():
            for direction in DIRECTIONS:
                counters = tier.counters(direction)
                report.breakers[self._rank, name, direction] = BreakerReading(
                    tier.state(direction) != "closed", counters.failures, counters.refusals, counters.openings
                )
        copying = self._read_copying()
        if copying != self._copying:
            report.copying[self._rank] = self._copying = copying
        return report

    def give_up(self, operations: Sequence[int], cause: str = CRASH) -> None:
        """Whoever was to carry these operations out cannot; any thread."""
        self._finish(operations, cause)

    def close(self, timeout: float | None = None) -> None:
        """Let the writes under way end within timeout seconds (default: as configured), then release memory and connections."""
        self.copier.close()
        if not self._tier_copies.close(self._close_timeout if timeout is None else timeout):
            return  # a thread still uses the memory; it ends with the tier's own time-out, or with the process
        for tier in self._tiers.values():
            tier.close()
        self._slab.close()

    def _note_unfilled(self, blocks: set[int]) -> None:
        """Record that the forward pass that begins, or has ended, reads these blocks while they hold garbage."""
        if blocks:
            self._failed_blocks.update(blocks)
            with self._lock:
                self._fault += 1
                self._report.faults[self._rank] = self._fault

    def _settle(self) -> None:
        """Record how copies of blocks ended. The forward pass counts as over, also if this is called before end()."""
        self._note_unfilled(self.copier.end_layers())
        for batch in self.copier.ended():
            self._finish(batch.operations, COPY if batch.failed else None)
            if batch.failed and batch.background:
                self._failed_blocks.update(batch.blocks)
                self._failed_requests.add(batch.request_id)
            if batch.background:
                self._loaded.add(batch.request_id)
            if not batch.failed:
                self._measure(str(batch.direction), batch.num_bytes, batch.seconds)
            if not batch.failed and batch.direction is Direction.LOAD:
                with self._lock:
                    num_bytes, seconds = self._report.loads.get(batch.request_id, (0, 0.0))
                    self._report.loads[batch.request_id] = (num_bytes + batch.num_bytes, seconds + batch.seconds)

    def _finish(self, operations: Sequence[int], failure: str | None) -> None:
        """End an operation. failure is one of CAUSES; any other text counts as COPY."""
        with self._lock:
            self._report.finished.update(Counter(operations))
            if failure is not None:
                cause = failure if failure in CAUSES else COPY
                self._report.failed.update(dict.fromkeys(operations, cause))

    def _note_moved(self, copy: TierCopy, raw_bytes: int, moved: Moved, seconds: float) -> None:
        with self._lock:
            note_moved(self._report, copy, raw_bytes, moved, seconds)

    def _measure(self, what: str, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self._report.transfers.append((what, num_bytes, seconds))


def _look_into(tier: BoundedBreaker) -> tuple[dict[ChunkKey, int], dict[ChunkKey, ChunkKey]]:
    found = dict(tier.scan())
    return found, tier.parents(list(found))


def _progress(tier: BoundedBreaker) -> int:
    return tier.progress


def note_moved(report: Report, copy: TierCopy, raw_bytes: int, moved: Moved, seconds: float) -> None:
    """Add to the report what a tier's codec has done in a copy, and how long whoever waits for it has waited."""
    saved = stored_bytes(raw_bytes) - moved.stored_bytes
    kind, tier = copy.ticket.kind, copy.ticket.tier
    if kind == "write" and saved:
        report.saved[copy.ticket.operation] += saved
    if moved.codec_seconds:
        report.codecs.append(CodecRun(tier, kind, raw_bytes, moved.stored_bytes, moved.codec_seconds))
    if kind == "stage":
        report.staged[copy.ticket.operation] = seconds


@dataclass
class Scan:
    """What bounded tiers hold, oldest first, with its bytes, which chunk continues which, and what is wrong with them."""

    stored: dict[str, dict[ChunkKey, int]] = field(default_factory=dict)
    parents: dict[ChunkKey, ChunkKey] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def scan_tiers(tiers: Mapping[str, Breaker]) -> Scan:
    scan = Scan()
    for name, tier in tiers.items():
        if not isinstance(tier, BoundedBreaker):
            continue
        scan.stored[name] = {}
        if not tier.is_open:
            continue  # it hangs, and has said so
        try:
            look, progress = partial(_look_into, tier), partial(_progress, tier)
            scan.stored[name], known = wait_for(look, tier.patience(0), f"{name} tier: a scan", progress)
            scan.parents.update(known)
        except TierHangs as error:
            text = f"{error}; what it holds is found at the next start"
            logger.warning("lmc: %s", text)
            scan.warnings.append(text)
        except TierError as error:
            del scan.stored[name]
            scan.warnings.append(str(error))
    return scan


def read_copying(backend: AutoBackend, slab: Slab) -> CopyReading:
    """How a rank copies between blocks and slots, for the report."""
    return CopyReading(dict(backend.chosen), dict(backend.refused), backend.threads, slab.pinned_slots, slab.problem)
