"""The wire between the two halves: the plan that the scheduler sends to the workers in a step, and the report that they send back.

It is plain data that can be pickled. Every piece of work has an operation id. A worker carries out a whole plan or reports what failed; the
directory changes its state only by reports. The report of several ranks is the merge of theirs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lmc.cache.directory.holds import (
    ABSENT,
    CAUSES,
    COPY,
    CORRUPT,
    CRASH,
    ERROR,
    FORGED,
    FULL,
    LATE,
    NO_OPERATION,
    UNAVAILABLE,
    Ticket,
)
from lmc.cache.keys import ChunkKey, Element, Namespace, hashed_name
from lmc.cache.parts import SPINE, Parts

__all__ = [
    "ABSENT",
    "CAUSES",
    "COPY",
    "CORRUPT",
    "CRASH",
    "ERROR",
    "FORGED",
    "FULL",
    "LATE",
    "NO_OPERATION",
    "SKIP",
    "UNAVAILABLE",
    "BlockCopy",
    "BreakerReading",
    "CodecRun",
    "CopyReading",
    "Plan",
    "Report",
    "RequestCopies",
    "Ticket",
    "TierCopy",
    "WorkerReady",
    "block_copies",
    "blocks_of",
    "request_name",
    "shown",
]

SKIP = -1  # stands for a block that is not copied


class BlockCopy(NamedTuple):
    """One part of a chunk between a host slot and engine blocks; `blocks` has an id, or SKIP, for each of its blocks."""

    operation: int
    key: ChunkKey
    slot: int
    blocks: tuple[int, ...]
    group: int = 0  # of the engine's KV, in the order of lmc.cache.parts


def blocks_of(blocks: Sequence[int], start: int, count: int, held: int) -> tuple[int, ...]:
    """`count` blocks of a prompt with these blocks, from its block number `start` on; SKIP for those among its first `held` ones."""
    chosen = tuple(blocks[start : start + count])
    if held > start:
        chosen = (SKIP,) * min(held - start, len(chosen)) + chosen[held - start :]
    return chosen


def block_copies(
    parts: Parts,
    tickets: Sequence[tuple[int, Ticket]],
    tables: Sequence[Sequence[int]],
    computed: int,
    *,
    stores: bool = False,
) -> tuple[tuple[BlockCopy, ...], list[int]]:
    """Copies between slots and a request's blocks, without the blocks of the first `computed` tokens, which others may be reading.

    tickets: each with the index of its chunk. tables: the request's blocks in each group, SKIP where it has none. Returns also the
    operations for parts that the engine does not hold in full; a load may leave out blocks of the spine, whose layers do not need them.
    """
    copies, gone = [], []
    group, table = -1, tables[SPINE]
    count = per_chunk = before = held = 0
    for index, ticket in tickets:
        if ticket.group != group:
            group = ticket.group
            count, per_chunk, size = parts.shapes[group]
            table, before, held = tables[group], per_chunk - count, computed // size
        start = index * per_chunk + before
        blocks = blocks_of(table, start, count, held)
        if (stores or group != SPINE) and (len(blocks) < count or SKIP in blocks[max(0, held - start) :]):
            gone.append(ticket.operation)
            continue
        copies.append(BlockCopy(ticket.operation, ticket.key, ticket.slot, blocks, group))
    return tuple(copies), gone


_PLAIN = re.compile(r'[ !"$-~]{1,100}')  # printable ASCII without #


def request_name(request_id: str) -> str:
    """A request's id as logs, spans and pins show it: at most 100 characters of printable ASCII, equal for equal ids only."""
    if _PLAIN.fullmatch(request_id):
        return request_id
    return f"{shown(request_id)}#{hashed_name(request_id)}"


def shown(text: str) -> str:
    """The start of a client's text, fit for a log line."""
    return re.sub(r'[^ !"$-~]', "?", text[:40])


@dataclass(frozen=True, slots=True)
class RequestCopies:
    request_id: str
    chunks: tuple[BlockCopy, ...]  # consecutive chunks of the prefix


def operations_of(requests: Iterable[RequestCopies]) -> list[int]:
    return [chunk.operation for request in requests for chunk in request.chunks]


class TierCopy(NamedTuple):
    """A ticket of the directory for a tier below the host: one chunk to write there, to stage from there or to delete there.

    A copy with a limit does not start if it has waited for longer than this many seconds, because no request waits for it any more.
    """

    ticket: Ticket
    limit: float | None = None


@dataclass
class Plan:
    """The work of one engine step, the same for every rank."""

    loads: list[RequestCopies] = field(default_factory=list)  # host slots -> blocks, before the forward pass
    background_loads: list[RequestCopies] = field(default_factory=list)  # the same, for requests outside the batch
    stores: list[RequestCopies] = field(default_factory=list)  # blocks -> host slots, after it
    tier_copies: list[TierCopy] = field(default_factory=list)  # in the background
    failed_blocks: list[int] = field(default_factory=list)  # promised blocks that nothing will fill
    failed_requests: list[str] = field(default_factory=list)  # those that wait for a background load that will not come
    known_faults: dict[int, int] = field(
        default_factory=dict
    )  # rank -> the Report.faults that this plan takes into account
    memory: str = ""  # the node in whose memory the slots are; none: the worker's own memory

    def __bool__(self) -> bool:
        return bool(
            self.loads
            or self.background_loads
            or self.stores
            or self.tier_copies
            or self.failed_blocks
            or self.failed_requests
        )


class BreakerReading(NamedTuple):
    """The state of one direction of a circuit breaker, and its totals since the start."""

    is_open: bool
    failures: int
    refusals: int
    openings: int


class CodecRun(NamedTuple):
    """What a tier's codec did in one copy, also where it found nothing to shorten."""

    tier: str
    kind: str  # "write" or "stage"
    raw_bytes: int
    stored_bytes: int  # with the footer
    seconds: float


class CopyReading(NamedTuple):
    """How one rank copies between blocks and slots, with totals since the start."""

    batches: dict[tuple[str, str], int]  # (backend that was chosen, direction) -> batches
    refusals: dict[str, int]  # "backend: why it could not copy them" -> batches
    threads: int  # that share a large batch out; on a device the CPU's threads do not copy
    pinned_slots: int  # host slots that are registered with the device's driver
    problem: str  # why host memory is slower than it should be


@dataclass
class Report:
    """What became of operations since the last report."""

    finished: Counter[int] = field(default_factory=Counter)  # operation -> ranks that ended it, well or not
    failed: dict[int, str] = field(default_factory=dict)  # operation -> cause, one of CAUSES
    transfers: list[tuple[str, int, float]] = field(default_factory=list)  # (what, bytes, seconds) of each batch
    loads: dict[str, tuple[int, float]] = field(default_factory=dict)  # request -> (bytes, seconds) of its loads
    breakers: dict[tuple[int, str, str], BreakerReading] = field(default_factory=dict)  # by rank, tier and direction
    faults: dict[int, int] = field(default_factory=dict)  # rank -> number of its last forward pass on unfilled blocks
    copying: dict[int, CopyReading] = field(default_factory=dict)  # by rank, where it has changed
    stuck: set[int] = field(default_factory=set)  # operations that hang in a tier on some rank and may never end
    saved: Counter[int] = field(default_factory=Counter)  # write -> bytes less than the raw chunk takes, over the ranks
    codecs: list[CodecRun] = field(default_factory=list)
    staged: dict[int, float] = field(default_factory=dict)  # stage -> seconds since the rank was told of it

    def merge(self, other: Report) -> Report:
        """Both reports as one; for reports of different ranks."""
        return Report(
            self.finished + other.finished,
            {**other.failed, **self.failed},
            self.transfers + other.transfers,
            _side_by_side(self.loads, other.loads),
            {**other.breakers, **self.breakers},
            {**other.faults, **self.faults},
            {**other.copying, **self.copying},
            self.stuck | other.stuck,
            self.saved + other.saved,
            self.codecs + other.codecs,
            _longest(self.staged, other.staged),
        )

    def __bool__(self) -> bool:
        return bool(self.finished or self.copying or self.stuck or self.faults)


def _longest(seconds: Mapping[int, float], others: Mapping[int, float]) -> dict[int, float]:
    """Of each operation the longer time."""
    merged = dict(seconds)
    for operation, other in others.items():
        merged[operation] = max(merged.get(operation, 0.0), other)
    return merged


def _side_by_side(
    loads: dict[str, tuple[int, float]], others: dict[str, tuple[int, float]]
) -> dict[str, tuple[int, float]]:
    """The loads of two ranks, which copy at the same time."""
    merged = dict(loads)
    for request, (num_bytes, seconds) in others.items():
        known_bytes, known_seconds = merged.get(request, (0, 0.0))
        merged[request] = (known_bytes + num_bytes, max(known_seconds, seconds))
    return merged


@dataclass(frozen=True)
class WorkerReady:
    """A worker's introduction, once at start."""

    namespace: Namespace
    rank: int
    chunk_bytes: int
    host_slots: int
    stored: dict[
        str, dict[ChunkKey, int]
    ]  # bounded tier -> what a scan found, oldest first, and its bytes with the footer
    copying: CopyReading
    remote: tuple[str, ...] = ()  # tiers with an eviction of their own
    warnings: tuple[str, ...] = ()
    parents: dict[ChunkKey, ChunkKey] = field(default_factory=dict)  # of stored chunks, as far as they are known
    # Which part of each chunk it holds, as names have it; None: its slots are another rank's, who stores these bytes for it
    part: int | None = 0
    mapping: str = ""  # the number by which a node knows the worker; none: the memory is the worker's own
    element: Element = "opaque"  # told to a node, which opens the tiers for the worker
    part_bytes: tuple[int, ...] = ()  # by group, if the KV has several; chunk_bytes is then the largest


class Ended(NamedTuple):
    operation: int
    cause: str | None  # of its failure on one of the ranks
    saved: int  # bytes by which compression made what was written shorter, over all ranks
    seconds: float | None  # of a stage: until the last rank had its part


class AllRanks:
    """What all ranks together say of an operation: it has ended when it has ended on each of them, and failed when it failed on one."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._ranks: dict[int, int] = {}  # operation -> ranks that reported its end; the others hold what these said
        self._causes: dict[int, str] = {}
        self._saved: Counter[int] = Counter()
        self._staged: dict[int, float] = {}

    def __len__(self) -> int:
        """Operations of which some rank has said something."""
        return len({*self._ranks, *self._causes, *self._saved, *self._staged})

    def ended(self, report: Report) -> Sequence[Ended]:
        """Take in what ranks report. Returns the operations that have ended on all of them now."""
        self._causes.update(report.failed)
        self._saved.update(report.saved)
        self._staged = _longest(self._staged, report.staged)
        ended = []
        for operation, ranks in report.finished.items():
            total = self._ranks.pop(operation, 0) + ranks
            if total < self._num_ranks:
                self._ranks[operation] = total
                continue
            cause, saved = self._causes.pop(operation, None), self._saved.pop(operation, 0)
            ended.append(Ended(operation, cause, saved, self._staged.pop(operation, None)))
        return ended
