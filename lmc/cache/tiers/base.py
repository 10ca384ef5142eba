"""What a tier below the host slab is: a store of whole chunks by name. Host slots are lmc.cache.transfer.pinned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from lmc.cache.keys import ChunkKey


class Tier(Protocol):
    """One store of one rank's chunks of one namespace. Calls come from I/O threads, several at a time.

    Every method raises TierError with tier and key when it fails. put is atomic: a reader in any process sees all of the chunk or nothing,
    also after kill -9. get verifies length and checksum before it returns.
    """

    name: str

    def put(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> None:
        """Store a chunk; replacing one of the same key is fine. parent is the chunk before it; None: it is the first of its prefix.

        Raises TierFull when there is no room.
        """

    def get(self, key: ChunkKey, out: memoryview) -> None:
        """Fill out, whose size is the chunk's. Raises KeyError when absent, Corrupt when the bytes are not what was put."""

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which of the keys are stored now."""

    def delete(self, key: ChunkKey) -> None:
        """Remove a chunk; absent is fine."""

    def close(self) -> None:
        """Release connections and files. Stored chunks stay."""


@runtime_checkable
class BoundedTier(Tier, Protocol):
    """A tier that evicts nothing by itself, so the directory decides what goes, and learns at the start what there is."""

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        """Each stored key and the bytes of its payload, oldest first."""

    def parents(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, ChunkKey]:
        """The chunk before each of keys, as far as the tier can tell within seconds; keys as scan() lists them."""
