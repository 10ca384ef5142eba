"""Why a chunk is absent."""

from __future__ import annotations

from collections import OrderedDict
from enum import StrEnum

from lmc.cache.keys import ChunkKey

_REMEMBERED = 16_384


class Miss(StrEnum):
    """Why the first absent chunk of a lookup is absent; evicted_from() gives the reasons that name a tier."""

    NEVER_STORED = "never stored"
    EXPIRED = "expired"
    LOAD_FAILED = "load failed"
    STORE_FAILED = "store failed"
    NO_ROOM = "no room to store"
    IN_FLIGHT = "store in flight"
    CLEARED = "cleared"
    # These are found out by the engine, not by the directory:
    SALT_DIFFERS = "salt differs"  # the first chunk is there for another tenant or adapter
    BELOW_MINIMUM = "below minimum"
    LOAD_DEADLINE = "load deadline"
    REMOTE_DEADLINE = "remote deadline"


def evicted_from(tier: str) -> str:
    return f"evicted from {tier}"


class MissLog:
    """The last reasons, by key; the oldest are forgotten."""

    def __init__(self) -> None:
        self._reasons: OrderedDict[ChunkKey, str] = OrderedDict()

    def note(self, key: ChunkKey, why: str) -> None:
        self._reasons[key] = why
        self._reasons.move_to_end(key)
        if len(self._reasons) > _REMEMBERED:
            self._reasons.popitem(last=False)

    def reason(self, key: ChunkKey) -> str:
        return self._reasons.get(key, Miss.NEVER_STORED)
