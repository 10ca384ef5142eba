"""Pins that clients asked for. SGLang says when a request leaves the queue, not when it ends: its chunks are stored after that."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.directory import Directory
from lmc.cache.keys import ChunkKey


class AskedPins:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        # owner -> keys, not all of them stored, and expiry
        self._waiting: dict[str, tuple[Sequence[ChunkKey], float]] = {}

    def ask(self, rid: str, keys: Sequence[ChunkKey], expires: float, now: float) -> None:
        """Keep these chunks until the expiry, those that are yet to be stored as well."""
        self._waiting[f"{rid} asked"] = (keys, expires)
        self.renew(now)

    def renew(self, now: float) -> None:
        """Chunks have been stored."""
        for owner, (keys, expires) in list(self._waiting.items()):
            self._directory.unpin(owner)
            if now >= expires or self._directory.pin(keys, owner, expires) == len(keys):
                del self._waiting[owner]
