"""Pins that requests ask for, within the limits of the settings (clients.*)."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.directory import HOST, Directory
from lmc.cache.directory.build import slots_of
from lmc.cache.keys import ChunkKey
from lmc.cache.observe.metrics import CacheMetrics
from lmc.cache.sections import ClientsConfig

_OWNER = "asked "  # what these pins' owners begin with


class ClientPins:
    """chunk_bytes: over all ranks. A pin that a setting makes smaller than asked for is counted in metrics.pins_cut."""

    def __init__(self, directory: Directory, limits: ClientsConfig, chunk_bytes: int, metrics: CacheMetrics) -> None:
        self._directory = directory
        self._limits = limits
        self._most_chunks = slots_of(limits.pin_share, directory.usage()[HOST][1], chunk_bytes)
        self._cut = metrics.pins_cut
        self.waiting: dict[str, tuple[Sequence[ChunkKey], float]] = {}  # owner -> keys, not all stored yet, and expiry

    def ask(self, name: str, keys: Sequence[ChunkKey], seconds: float, now: float, *, later: bool = False) -> None:
        """Keep the chunks of keys that are stored or being stored; with later also those for which renew() comes. name: of the request."""
        if not keys:
            return
        owner, held = _OWNER + name, self._held()
        for other in [other for other, (_, expires) in self.waiting.items() if expires <= now]:
            del self.waiting[other]
        others = (held.keys() | self.waiting.keys()) - {owner}
        if len(others) >= self._limits.pins:
            self._cut.labels("clients.pins").inc()
            return
        if seconds > self._limits.pin_seconds:
            self._cut.labels("clients.pin_seconds").inc()
        if not self._pin(owner, keys, now + min(seconds, self._limits.pin_seconds)):
            self._cut.labels("clients.pin_share").inc()
        if not later:
            self.waiting.pop(owner, None)

    def renew(self, now: float) -> None:
        """More chunks are being stored."""
        for owner, (keys, expires) in list(self.waiting.items()):
            if now < expires:
                self._pin(owner, keys, expires)
            else:
                self._directory.unpin(owner)
                del self.waiting[owner]

    def forget(self) -> None:
        """The directory has dropped all pins."""
        self.waiting.clear()

    def _pin(self, owner: str, keys: Sequence[ChunkKey], expires: float) -> bool:
        """Pin the leading keys for which there is room. Returns whether there is room for all."""
        self._directory.unpin(owner)
        room = max(0, self._most_chunks - sum(self._held().values()))
        kept = keys[:room]
        if not kept or self._directory.pin(kept, owner, expires) == len(kept):
            self.waiting.pop(owner, None)
        else:
            self.waiting[owner] = (keys, expires)
        return len(kept) == len(keys)

    def _held(self) -> dict[str, int]:
        """Chunks by owner."""
        pins = self._directory.pins()
        return {owner: chunks for owner, (chunks, _) in pins.items() if owner.startswith(_OWNER)}
