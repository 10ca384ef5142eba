"""Which chunk became readable in which bounded tier, or left it, for whoever tells others. Nothing is kept until somebody watches."""

from __future__ import annotations

from typing import NamedTuple

from lmc.cache.keys import ChunkKey


class Change(NamedTuple):
    tier: str
    key: ChunkKey
    readable: bool  # a chunk that leaves may never have been


class Changes:
    def __init__(self) -> None:
        self.watched = False
        self._changes: list[Change] = []

    def watch(self) -> None:
        """Keep changes from now on; take() must be called regularly."""
        self.watched = True

    def note(self, tier: str, key: ChunkKey, readable: bool) -> None:
        self._changes.append(Change(tier, key, readable))

    def take(self) -> list[Change]:
        """What changed since the last call, in order."""
        taken, self._changes = self._changes, []
        return taken
