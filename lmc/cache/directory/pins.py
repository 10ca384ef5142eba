"""Who keeps chunks from eviction, and until when."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.directory.places import Places
from lmc.cache.keys import ChunkKey


class Pins:
    def __init__(self, places: Places) -> None:
        self._places = places
        self._pins: dict[str, tuple[list[int], float]] = {}  # owner -> nodes, time of expiry

    def __len__(self) -> int:
        return len(self._pins)

    def add(self, keys: Sequence[ChunkKey], owner: str, expires: float) -> int:
        """How many of keys could be pinned: those in a bounded tier. An owner has one pin; a second call adds to it."""
        places = self._places
        nodes, _ = self._pins.get(owner, ([], 0.0))
        added = [node for node in places.nodes.chain(keys) if node >= 0 and places.present(node)]
        places.hold(added, 1)
        self._pins[owner] = (nodes + added, expires)
        return len(added)

    def drop(self, owner: str) -> bool:
        """False if the owner has no pin."""
        pin = self._pins.pop(owner, None)
        if pin is None:
            return False
        self._places.hold(pin[0], -1)
        for node in pin[0]:
            self._places.forget_unused(node)
        return True

    def drop_expired(self, now: float) -> None:
        for owner in [owner for owner, (_, expires) in self._pins.items() if expires <= now]:
            self.drop(owner)

    def listed(self) -> dict[str, tuple[int, float]]:
        return {owner: (len(nodes), expires) for owner, (nodes, expires) in self._pins.items()}
