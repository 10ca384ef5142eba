"""A remote tier that several instances share. It evicts the least recently used chunk; instances must ask what it holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from lmc.cache.keys import ChunkKey

SHARED = "remote"


class SharedStore:
    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[ChunkKey, None] = OrderedDict()

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._held

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [key in self._held for key in keys]

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: ChunkKey) -> bool:
        if key not in self._held:
            return False
        self._held.move_to_end(key)
        return True

    def put(self, key: ChunkKey) -> None:
        self._held[key] = None
        self._held.move_to_end(key)
        if len(self._held) > self._capacity:
            self._held.popitem(last=False)
