"""What the directory's side tells the workers to do in a step, and what they report back. Plain data that pickles.

Every piece of work has an operation id. A worker does all of a plan or reports the failure; only a report changes what the directory
believes. A report of several ranks is their merge.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from lmc.cache.keys import ChunkKey, Namespace

SKIP = -1  # stands for a block that is not copied


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """One chunk between a host slot and engine blocks; `blocks` has an id, or SKIP, for each block of the chunk."""

    operation: int
    key: ChunkKey
    slot: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestCopies:
    request_id: str
    chunks: tuple[BlockCopy, ...]  # consecutive chunks of the prefix


@dataclass(frozen=True, slots=True)
class TierCopy:
    """One chunk between a host slot and a tier below. `evict` goes from that tier before the chunk is written."""

    operation: int
    kind: Literal["write", "stage", "delete"]
    tier: str
    key: ChunkKey
    slot: int
    evict: tuple[ChunkKey, ...] = ()


@dataclass
class Plan:
    """The work of one engine step, the same for every rank."""

    loads: list[RequestCopies] = field(default_factory=list)  # host slots -> blocks, before the forward pass
    stores: list[RequestCopies] = field(default_factory=list)  # blocks -> host slots, after it
    tier_copies: list[TierCopy] = field(default_factory=list)  # in the background
    failed_blocks: list[int] = field(default_factory=list)  # promised blocks that nothing will fill

    def __bool__(self) -> bool:
        return bool(self.loads or self.stores or self.tier_copies or self.failed_blocks)


@dataclass
class Report:
    """What became of operations since the last report."""

    finished: Counter[int] = field(default_factory=Counter)  # operation -> ranks that ended it, well or not
    failed: dict[int, str] = field(default_factory=dict)  # operation -> cause
    transfers: list[tuple[str, int, float]] = field(default_factory=list)  # (what, bytes, seconds) of each batch

    def merge(self, other: Report) -> Report:
        """Both reports as one; for reports of different ranks."""
        return Report(self.finished + other.finished, {**other.failed, **self.failed}, self.transfers + other.transfers)

    def __bool__(self) -> bool:
        return bool(self.finished)


@dataclass(frozen=True)
class WorkerReady:
    """A worker's introduction, once at start."""

    namespace: Namespace
    rank: int
    chunk_bytes: int
    host_slots: int
    stored: dict[str, list[ChunkKey]]  # tier -> what a scan found, oldest first
    warnings: tuple[str, ...] = ()
    failure: str = ""  # why this worker runs without a cache
