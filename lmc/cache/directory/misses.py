"""Reasons why a chunk is absent."""

from __future__ import annotations

from enum import StrEnum
from sys import intern

from lmc.cache.keys import ChunkKey

_GENERATION = 4_096


class Miss(StrEnum):
    """Why the first absent chunk of a lookup is absent; evicted_from() gives the reasons that name a tier."""

    NEVER_STORED = "never stored"
    EXPIRED = "expired"
    LOAD_FAILED = "load failed"
    STORE_FAILED = "store failed"
    NO_ROOM = "no room to store"
    IN_FLIGHT = "store in flight"
    CLEARED = "cleared"
    # The request finds these out, not the directory:
    SALT_DIFFERS = "salt differs"  # the first chunk is there for another tenant or adapter
    NO_CHECKPOINT = "no checkpoint"  # chunks were found, but not what a hit that ends there needs of the other parts
    BELOW_MINIMUM = "below minimum"
    SLOWER = "slower than computing"
    LOAD_DEADLINE = "load deadline"
    REMOTE_DEADLINE = "remote deadline"
    REMOTE_FAILED = "remote failed"
    NODE_AWAY = "node away"  # the engine is not attached to its node
    NODE_DEADLINE = "node deadline"  # the node did not answer in time


def evicted_from(tier: str) -> str:
    return intern(f"evicted from {tier}")


class MissLog:
    """The newest reasons, by key, in two generations. When the young generation is full, the old one is forgotten."""

    def __init__(self) -> None:
        self._young: dict[ChunkKey, str] = {}
        self._old: dict[ChunkKey, str] = {}

    def note(self, key: ChunkKey, why: str) -> None:
        self._young[key] = why
        if len(self._young) >= _GENERATION:
            self._old, self._young = self._young, {}

    def reason(self, key: ChunkKey) -> str:
        return self._young.get(key) or self._old.get(key) or Miss.NEVER_STORED
