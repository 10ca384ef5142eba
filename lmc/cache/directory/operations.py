"""What was handed out to be copied and is not yet reported back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lmc.cache.keys import ChunkKey

Kind = Literal["store", "write", "stage", "delete", "load"]


class Ticket(NamedTuple):
    """A copy to make: store (blocks to slot), load (slot to blocks), write (slot to tier), stage (tier to slot), delete (in tier).

    `evict` goes from the tier before the chunk is written; `parent` is the chunk before it, if there is one.
    """

    operation: int
    kind: Kind
    key: ChunkKey
    tier: str
    slot: int
    evict: tuple[ChunkKey, ...] = ()
    parent: ChunkKey | None = None


@dataclass(slots=True)
class Operation:
    ticket: Ticket
    node: int  # -1: of a chunk that only a remote tier knows
    evict: tuple[int, ...] = ()
    demotes: bool = False  # when it is done the host copy goes


class Operations:
    def __init__(self) -> None:
        self._open: dict[int, Operation] = {}
        self._last = 0

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
        *,
        evict: tuple[ChunkKey, ...] = (),
        parent: ChunkKey | None = None,
        evict_nodes: tuple[int, ...] = (),
        demotes: bool = False,
    ) -> Ticket:
        self._last += 1
        ticket = Ticket(self._last, kind, key, tier, slot, evict, parent)
        self._open[self._last] = Operation(ticket, node, evict_nodes, demotes)
        return ticket

    def close(self, operation: int) -> Operation | None:
        return self._open.pop(operation, None)
