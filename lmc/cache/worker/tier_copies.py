"""Copies between host slots and the tiers below, on threads of each tier: some read, and as many others write.

A tier may fail, hang or be left alone by its breaker, the machine may have no thread to give: each copy ends with a cause all the same.
Only one that hangs in the tier cannot be ended; it is told as stuck, and nothing waits behind it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from lmc.cache.keys import ChunkKey
from lmc.cache.observe.logs import Sparingly
from lmc.cache.plan import ABSENT, CORRUPT, CRASH, ERROR, FORGED, FULL, LATE, UNAVAILABLE, TierCopy
from lmc.cache.tiers.breaker import BoundedBreaker, Breaker, Direction, TierOpen
from lmc.cache.tiers.stored import NOTHING, Moved
from lmc.cache.tiers.threads import IoThreads
from lmc.errors import Corrupt, Forged, TierError, TierFull

logger = logging.getLogger(__name__)

WRITE_NICENESS = 10  # a tenth of the weight of an ordinary thread: enough to get on when the machine is full
_OWED_AT_ONCE = 8  # deletions made up for with each write

_told = Sparingly()


class Slots(Protocol):
    """Where the chunks are that are written and staged: a Slab, or this rank's part of a node's memory."""

    @property
    def slot_bytes(self) -> int: ...

    def view(self, slot: int) -> memoryview:
        """A slot's bytes, writable in place; from any thread."""


class _Job(NamedTuple):
    copy: TierCopy
    submitted: float


class TierCopier:
    """finish(operations, cause), measure(what, bytes, seconds) and moved(copy, raw bytes, Moved, seconds since begin()) are called from any
    thread.

    io_threads: by tier, each way. part_bytes: of a part of each group, if there are several.
    """

    def __init__(
        self,
        tiers: Mapping[str, Breaker],
        slab: Slots,
        rank: int,
        *,
        io_threads: Mapping[str, int],
        finish: Callable[[Sequence[int], str | None], None],
        measure: Callable[[str, int, float], None],
        moved: Callable[[TierCopy, int, Moved, float], None],
        part_bytes: Sequence[int] = (),
    ) -> None:
        self._tiers = dict(tiers)
        self._slab = slab
        self.rank = rank
        self._finish = finish
        self._measure = measure
        self._moved = moved
        self._part_bytes = tuple(part_bytes)
        self._sparingly = Sparingly()
        # Apart, so that neither a slow tier nor a queue of writes holds up what a request waits for.
        self._threads: dict[tuple[str, Direction], IoThreads[_Job]] = {}
        for name in tiers:
            self._threads[name, "read"] = IoThreads(io_threads[name], f"lmc-{name}-read", self._run)
            self._threads[name, "write"] = IoThreads(
                io_threads[name], f"lmc-{name}-write", self._run, yield_to_the_engine
            )
        self._stuck: set[int] = set()  # operations that were told to be
        self._lock = threading.Lock()
        self._owed: dict[str, dict[ChunkKey, None]] = {}  # by bounded tier, chunks that are gone for the directory only

    def begin(self, copy: TierCopy) -> None:
        """Start a copy, or end it at once where that is no use."""
        way = _way(copy)
        if self._is_left_alone(*way):
            self._end(copy, UNAVAILABLE)
        elif not self._threads[way].put(_Job(copy, time.monotonic())):
            text = f"{copy.ticket.tier} tier: cannot start a thread; raise the limit of processes"
            self._sparingly.warn(logger, "thread", text, tier=copy.ticket.tier, cause=ERROR)
            self._end(copy, ERROR)

    def settle(self) -> set[int]:
        """End what waits for nothing; returns the operations that are found stuck since the last call: they may never end."""
        now = time.monotonic()
        found: set[int] = set()
        for way, threads in self._threads.items():
            if threads.idle:
                continue
            for job, seconds in threads.running():
                if seconds > self._patience(job.copy) and job.copy.ticket.operation not in self._stuck:
                    found.add(job.copy.ticket.operation)
                    self._complain(job.copy, ERROR, f"{way[0]} tier: no answer for {seconds:.1f} s")
            self._stuck |= found
            for job in threads.take_back(partial(_is_late, now=now)):
                self._end(job.copy, LATE)
            if self._is_left_alone(*way):
                for job in threads.take_back(lambda _: True):
                    self._end(job.copy, UNAVAILABLE)
        return found

    def close(self, timeout: float) -> bool:
        """Let the writes under way end within timeout seconds. False when some thread still uses the slots."""
        until = time.monotonic() + timeout
        lost = 0
        for way, threads in self._threads.items():
            while not threads.wait(min(max(until - time.monotonic(), 0.0), 0.1)) and time.monotonic() < until:
                if self._is_left_alone(*way):
                    break
            left = threads.close()
            for job in left:
                self._end(job.copy, CRASH)
            lost += len(left) + len(threads.running())
        if lost:
            logger.warning("lmc: closing with %d copies not done within %g s; those chunks are lost", lost, timeout)
        return all(threads.idle for threads in self._threads.values())

    def _is_left_alone(self, tier: str, direction: Direction) -> bool:
        """The breaker lets nothing through, or every thread hangs."""
        threads = self._threads[tier, direction]
        if self._tiers[tier].refuses(direction):
            return True
        stuck = [job for job, seconds in threads.running() if seconds > self._patience(job.copy)] if self._stuck else []
        return threads.saturated_by(len(stuck))

    def _patience(self, copy: TierCopy) -> float:
        return self._tiers[copy.ticket.tier].patience(0 if copy.ticket.kind == "delete" else self._slab.slot_bytes)

    def _run(self, job: _Job) -> None:
        copy = job.copy
        if _is_late(job, time.monotonic()):
            self._end(copy, LATE)
            return
        try:
            self._copy(job)
        except KeyError:
            self._end(copy, ABSENT)
        except TierOpen:
            self._end(copy, UNAVAILABLE)  # the breaker has said so when it opened
        except TierError as error:
            self._complain(copy, _cause(error), str(error))
            self._end(copy, _cause(error))
        except (Exception, SystemExit) as error:
            # A fault in lmc, or a library that ends its thread: say so, and let the operation end, so that its slot is free again.
            logger.error("lmc: %s of chunk %s crashed", copy.ticket.kind, copy.ticket.key.hex()[:16], exc_info=error)
            self._end(copy, CRASH)

    def _copy(self, job: _Job) -> None:
        copy = job.copy
        tier = self._tiers[copy.ticket.tier]
        view = self._slab.view(copy.ticket.slot) if copy.ticket.kind != "delete" else memoryview(b"")
        if self._part_bytes and view:  # a part may be shorter than its slot, where another chunk's bytes follow it
            view = view[: self._part_bytes[copy.ticket.group]]
        started = time.perf_counter()
        if copy.ticket.kind == "stage":
            moved = tier.get(copy.ticket.key, view)
        else:
            for key in (*self._take_owed(copy), *copy.ticket.evict):
                self._delete(tier, key)
            if copy.ticket.kind == "write":
                moved = tier.put(copy.ticket.key, view, copy.ticket.parent)
            else:
                tier.delete(copy.ticket.key)
                moved = NOTHING
        self._moved(copy, len(view), moved, time.monotonic() - job.submitted)
        self._measure(f"{copy.ticket.tier} {copy.ticket.kind}", len(view), time.perf_counter() - started)
        self._end(copy, None)  # last: whoever fails before it ends the operation once, as crashed

    def _delete(self, tier: Breaker, key: ChunkKey) -> None:
        """One that cannot be deleted is made up for later; what was to be written instead may still fit."""
        try:
            tier.delete(key)
        except TierError:
            self._owe(tier.name, [key])

    def _take_owed(self, copy: TierCopy) -> list[ChunkKey]:
        with self._lock:
            owed = self._owed.get(copy.ticket.tier)
            if not owed:
                return []
            if copy.ticket.kind == "write":
                owed.pop(copy.ticket.key, None)
            keys = [key for key, _ in zip(owed, range(_OWED_AT_ONCE), strict=False)]
            for key in keys:
                del owed[key]
            return keys

    def _owe(self, tier: str, keys: Sequence[ChunkKey]) -> None:
        if isinstance(self._tiers[tier], BoundedBreaker):
            with self._lock:
                self._owed.setdefault(tier, {}).update(dict.fromkeys(keys))

    def _end(self, copy: TierCopy, cause: str | None) -> None:
        ticket = copy.ticket
        if cause is not None and ticket.kind == "delete":
            self._owe(ticket.tier, [ticket.key])
        elif cause == UNAVAILABLE:
            self._owe(ticket.tier, ticket.evict)
        self._stuck.discard(copy.ticket.operation)
        self._finish([copy.ticket.operation], cause)

    def _complain(self, copy: TierCopy, cause: str, error: str) -> None:
        key = copy.ticket.key.hex()
        text = f"{copy.ticket.kind} of chunk {key[:16]} failed: {error}"
        about = {
            "operation": copy.ticket.kind,
            "tier": copy.ticket.tier,
            "cause": cause,
            "key": key,
            "rank": self.rank,
        }
        self._sparingly.warn(logger, (copy.ticket.tier, copy.ticket.kind, cause), text, **about)


def yield_to_the_engine() -> None:
    """Nobody waits for a write, and on a CPU engine a core that writes is missing from the forward pass."""
    try:
        niceness = max(os.getpriority(os.PRIO_PROCESS, 0), WRITE_NICENESS)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
    except OSError as error:  # a hardened container may refuse it
        _told.warn(logger, "nice", f"writes run at the engine's own priority: {error.strerror}")


def _way(copy: TierCopy) -> tuple[str, Direction]:
    return copy.ticket.tier, "read" if copy.ticket.kind == "stage" else "write"


def _is_late(job: _Job, now: float) -> bool:
    return job.copy.limit is not None and now - job.submitted > job.copy.limit


def _cause(error: TierError) -> str:
    if isinstance(error, Forged):
        return FORGED
    if isinstance(error, Corrupt):
        return CORRUPT
    return FULL if isinstance(error, TierFull) else ERROR
