"""Log of chunks that became readable in a bounded tier, or were removed from it. It stays empty until watch() is called."""

from __future__ import annotations

from typing import NamedTuple

from lmc.cache.keys import ChunkKey


class Change(NamedTuple):
    tier: str
    key: ChunkKey
    readable: bool  # False: removed, although it may never have been readable


class Changes:
    def __init__(self) -> None:
        self.watched = False
        self._changes: list[Change] = []

    def watch(self) -> None:
        """Start the log. From now on take() must be called regularly."""
        self.watched = True

    def note(self, tier: str, key: ChunkKey, readable: bool) -> None:
        self._changes.append(Change(tier, key, readable))

    def take(self) -> list[Change]:
        """Changes since the last call, in order."""
        taken, self._changes = self._changes, []
        return taken
