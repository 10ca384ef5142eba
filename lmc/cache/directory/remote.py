"""Bounded memory of the keys that are known to be in a tier which evicts on its own (Redis, S3).

A key that the tier has evicted since may still be in this memory. Then its stage fails, and the chunk counts as absent.
After BELIEVED_SECONDS a chunk that is in use here is written again, because nothing tells when a server was emptied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from lmc.cache.keys import ChunkKey

_FIRST_BATCH = 16  # keys; for most prompts, few or all of the chunks are there


def leading(
    keys: Sequence[ChunkKey], contains: Callable[[Sequence[ChunkKey]], Sequence[bool]]
) -> tuple[Sequence[ChunkKey], list[bool]]:
    """Ask a tier for consecutive chunks of a prefix, in growing batches up to the one with the first absent chunk.

    Returns the keys that were asked for, and for each whether it is there.
    """
    present: list[bool] = []
    size = _FIRST_BATCH
    while len(present) < len(keys):
        batch = contains(keys[len(present) : len(present) + size])
        present += batch
        if not all(batch):
            break
        size *= 4
    return keys[: len(present)], present


BELIEVED_SECONDS = 900.0


class RemoteKeys:
    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self._limit = limit
        self.now = float("-inf")  # the directory's time
        self._known: OrderedDict[ChunkKey, float] = OrderedDict()  # key -> when it was known to be there
        self._writing: set[ChunkKey] = set()
        self._deleting: set[ChunkKey] = set()

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def keys(self) -> Iterable[ChunkKey]:
        return self._known.keys()

    def learn(self, key: ChunkKey) -> None:
        """Record that the key is there, unless its deletion is under way."""
        if key in self._deleting:
            return
        self._known[key] = self.now
        self._known.move_to_end(key)
        if len(self._known) > self._limit:
            self._known.popitem(last=False)

    def forget(self, key: ChunkKey) -> None:
        self._known.pop(key, None)

    def may_write(self, key: ChunkKey) -> bool:
        known = self._known.get(key)
        fresh = known is not None and self.now - known < BELIEVED_SECONDS
        return not fresh and key not in self._writing and key not in self._deleting

    @property
    def num_writing(self) -> int:
        return len(self._writing)

    def begin_write(self, key: ChunkKey) -> None:
        self._writing.add(key)

    def end_write(self, key: ChunkKey, *, stored: bool) -> None:
        self._writing.discard(key)
        if stored:
            self.learn(key)

    def begin_delete(self, key: ChunkKey) -> bool:
        """Start a deletion. False if a write or another deletion of the key is under way."""
        if key in self._writing or key in self._deleting:
            return False
        self.forget(key)
        self._deleting.add(key)
        return True

    def deleting(self, key: ChunkKey) -> bool:
        return key in self._deleting

    def end_delete(self, key: ChunkKey) -> None:
        self._deleting.discard(key)
