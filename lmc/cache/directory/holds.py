"""Holds on chunks: operations that were handed out and are not yet reported back, and pins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lmc.cache.directory.nodes import RESIDENT
from lmc.cache.directory.places import Places
from lmc.cache.keys import ChunkKey

# Why an operation failed; the words of the metrics. The worker's log has the whole story.
ABSENT = "absent"  # the tier has no such chunk
CORRUPT = "corrupt"  # the stored bytes fail the checksum or length check
FORGED = "forged"  # it was not stored with this cache's auth_key
FULL = "full"  # no room in the tier
UNAVAILABLE = "unavailable"  # its circuit breaker is open
ERROR = "error"  # the tier failed otherwise
COPY = "copy"  # blocks could not be copied, or held garbage
LATE = "late"  # it waited beyond its limit
CRASH = "crash"  # a fault in lmc
CAUSES = (ABSENT, CORRUPT, FORGED, FULL, UNAVAILABLE, ERROR, COPY, LATE, CRASH)
NO_OPERATION = 0  # of a deletion whose end nobody waits for

Kind = Literal["store", "write", "stage", "delete", "load"]


class Ticket(NamedTuple):
    """A copy to make: store (blocks to slot), load (slot to blocks), write (slot to tier), stage (tier to slot), delete (in tier).

    `evict` is deleted from the tier before the chunk is written. `parent` is the chunk before this one, if there is one. `group`: which
    part of a chunk it is (lmc.cache.parts), where that matters.
    """

    operation: int
    kind: Kind
    key: ChunkKey
    tier: str
    slot: int
    evict: tuple[ChunkKey, ...] = ()
    parent: ChunkKey | None = None
    group: int = 0


@dataclass(slots=True)
class Operation:
    ticket: Ticket
    node: int  # -1: of a chunk that only a remote tier knows
    evict: tuple[int, ...] = ()
    demotes: bool = False  # when it is done the host copy goes
    stranded_slot: int = -1  # the host slot that a stuck copy may still fill; it is free again when the copy ends


class Operations:
    def __init__(self) -> None:
        self._open: dict[int, Operation] = {}
        self._stuck: set[int] = set()
        self._last = 0

    @property
    def num_stuck(self) -> int:
        return len(self._stuck)

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Operation]:
        return iter(self._open.values())

    def open(
        self,
        kind: Kind,
        key: ChunkKey,
        node: int,
        tier: str,
        slot: int,
        group: int,
        *,
        evict: tuple[ChunkKey, ...] = (),
        parent: ChunkKey | None = None,
        evict_nodes: tuple[int, ...] = (),
        demotes: bool = False,
    ) -> Ticket:
        self._last += 1
        ticket = Ticket(self._last, kind, key, tier, slot, evict, parent, group)
        self._open[self._last] = Operation(ticket, node, evict_nodes, demotes)
        return ticket

    def close(self, operation: int) -> Operation | None:
        if self._stuck:
            self._stuck.discard(operation)
        return self._open.pop(operation, None)

    def mark_stuck(self, operation: int) -> Operation | None:
        """Returns the operation, or None when it is not open or was stuck already."""
        if operation in self._stuck or operation not in self._open:
            return None
        self._stuck.add(operation)
        return self._open[operation]


class Pins:
    def __init__(self, places: Places) -> None:
        self._places = places
        self._pins: dict[str, tuple[list[int], float]] = {}  # owner -> nodes, time of expiry
        self._next_expiry = float("inf")  # no pin expires earlier

    def __len__(self) -> int:
        return len(self._pins)

    def add(self, keys: Sequence[ChunkKey], owner: str, expires: float) -> int:
        """Pin those of keys that are in a bounded tier, and return their number. An owner has one pin; a second call adds to it."""
        places = self._places
        nodes, _ = self._pins.get(owner, ([], 0.0))
        in_host = places.host.state
        chain = places.nodes.chain(keys)
        added = [node for node in chain if node >= 0 and (in_host[node] == RESIDENT or places.present(node))]
        places.hold(added, 1)
        self._pins[owner] = (nodes + added, expires)
        self._next_expiry = min(self._next_expiry, expires)
        return len(added)

    def drop(self, owner: str) -> bool:
        """Drop the owner's pin. False if it has none."""
        pin = self._pins.pop(owner, None)
        if pin is None:
            return False
        self._places.hold(pin[0], -1)
        in_host = self._places.host.state
        for node in pin[0]:
            if in_host[node] != RESIDENT:  # as nearly every one is, and then it is in use
                self._places.forget_unused(node)
        return True

    def drop_all(self) -> None:
        for owner in list(self._pins):
            self.drop(owner)

    def drop_expired(self, now: float) -> None:
        if now < self._next_expiry:
            return
        for owner in [owner for owner, (_, expires) in self._pins.items() if expires <= now]:
            self.drop(owner)
        self._next_expiry = min((expires for _, expires in self._pins.values()), default=float("inf"))

    def listed(self) -> dict[str, tuple[int, float]]:
        return {owner: (len(nodes), expires) for owner, (nodes, expires) in self._pins.items()}
