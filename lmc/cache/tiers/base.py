"""The interface of a tier below the host: a store of whole chunks by name. Host slots are in lmc.cache.transfer.pinned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.stored import Moved


class Tier(Protocol):
    """One store of one rank's chunks of one namespace. Calls come from I/O threads, several at a time.

    Every method raises TierError with tier and key when it fails. put is atomic: a reader in any process sees all of the chunk or nothing,
    also after kill -9. get verifies length and checksum before it returns.
    """

    name: str

    def put(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> Moved:
        """Store a chunk, or replace the one of the same key. parent is the chunk before it, or None for the first of a prefix.

        Raises TierFull when there is no room.
        """

    def get(self, key: ChunkKey, out: memoryview) -> Moved:
        """Fill out, of a chunk's size. Raises KeyError if it is absent, Corrupt if the stored bytes fail the checksum or length check."""

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """For each key, whether it is stored now."""

    def delete(self, key: ChunkKey) -> None:
        """Remove a chunk. It is no error if it is absent."""

    def close(self) -> None:
        """Release connections and files. Stored chunks stay."""


@runtime_checkable
class BoundedTier(Tier, Protocol):
    """A tier that evicts nothing by itself. The directory decides what to evict, and learns at start what the tier holds."""

    @property
    def progress(self) -> int:
        """Changes while scan() or parents() gets on; any thread may ask."""

    @property
    def is_open(self) -> bool:
        """False: the medium hung when it was opened, and has not answered since."""

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        """Each stored key and the bytes that it takes with its footer, oldest first."""

    def parents(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, ChunkKey]:
        """The chunk before each of keys, as far as the tier can read it within seconds. keys are those of scan(), in its order."""
