"""What an engine says of chunks beside the life of a request: that it offers to keep some, and that it used some."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.directory.directory import Directory
from lmc.cache.directory.holds import COPY, Ticket
from lmc.cache.keys import ChunkKey


def store_offer(
    directory: Directory, keys: Sequence[ChunkKey], known: int, tenant: str, now: float
) -> tuple[dict[int, Ticket], bool]:
    """Keep the chunks of a prefix from index `known` on; those before it are not on offer, so where they are not held, the rest stands
    alone.

    Returns the store tickets by the chunk's index, and whether every chunk on offer is kept or will be. An offer is no use of a chunk:
    policies do not hear of it.
    """
    first = 0 if directory.lookup(keys[:known], now).num_chunks == known else known
    tickets = _store(directory, keys, first, known, tenant, now, touch=False)
    kept = all(index in tickets or directory.tiers_of(keys[index]) for index in range(known, len(keys)))
    return tickets, kept


def use_prefix(directory: Directory, keys: Sequence[ChunkKey], tenant: str, now: float) -> None:
    """A request used this prefix, wherever its engine held it: what is stored of it counts as used now."""
    stored = directory.lookup(keys, now).num_chunks
    _store(directory, keys[:stored], 0, stored, tenant, now, touch=True)


def _store(
    directory: Directory, keys: Sequence[ChunkKey], first: int, known: int, tenant: str, now: float, *, touch: bool
) -> dict[int, Ticket]:
    """Store tickets by index. None for a chunk before `known`, though the directory would have it from an engine that computed it: the tier
    that has it did not give it out when it was wanted.
    """
    position = {key: index for index, key in enumerate(keys)}
    tickets: dict[int, Ticket] = {}
    for ticket in directory.store(keys[first:], now, tenant=tenant, touch=touch):
        index = position[ticket.key]
        if index < known:
            directory.complete(ticket.operation, COPY, now)
        else:
            tickets[index] = ticket
    return tickets
