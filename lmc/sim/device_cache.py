"""The engine's own KV space, in chunks: slots that requests hold, and finished chunks that stay until their slots are needed.

As in vLLM, a request's chunks are freed from the last to the first, the slot that was freed first is taken first, and equal chunks of two
requests that computed them at the same time stay two.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmc.cache.keys import ChunkKey


@dataclass
class Holding:
    """What one request holds: named chunks from the start of its prompt, then slots without a name."""

    named: list[ChunkKey] = field(default_factory=list)
    others: int = 0

    @property
    def slots(self) -> int:
        return len(self.named) + self.others


class DeviceCache:
    def __init__(self, capacity: int, keeps_prefixes: bool) -> None:
        self.capacity = capacity
        self._keeps_prefixes = keeps_prefixes
        self._holders: dict[ChunkKey, int] = {}  # chunk -> requests that hold it
        self._idle: OrderedDict[ChunkKey, None] = OrderedDict()  # chunks that nobody holds, longest first
        self._others = 0  # slots that are held without a name

    def match(self, keys: Sequence[ChunkKey]) -> int:
        """Leading chunks that are there."""
        count = 0
        while count < len(keys) and (keys[count] in self._holders or keys[count] in self._idle):
            count += 1
        return count

    def take(self, keys: Sequence[ChunkKey], extra: int) -> Holding | None:
        """Hold these chunks, which are there, and `extra` slots. None, and no change, if there is no room."""
        waking = sum(key in self._idle for key in keys)
        if len(self._holders) + self._others + waking + extra > self.capacity:
            return None
        for key in keys:
            self._idle.pop(key, None)
            self._holders[key] = self._holders.get(key, 0) + 1
        holding = Holding(list(keys))
        self.grow(holding, holding.slots + extra)
        return holding

    def grow(self, holding: Holding, slots: int) -> bool:
        """Hold so many slots in all. False, and no change, if there is no room."""
        extra = slots - holding.slots
        if extra <= 0:
            return True
        if len(self._holders) + self._others + extra > self.capacity:
            return False
        self._others += extra
        holding.others += extra
        while len(self._holders) + self._others + len(self._idle) > self.capacity:
            self._idle.popitem(last=False)
        return True

    def name(self, holding: Holding, keys: Sequence[ChunkKey]) -> None:
        """The first slots of the request hold these chunks now, in full."""
        if not self._keeps_prefixes:
            return
        for key in keys[len(holding.named) :]:
            if key in self._holders or holding.others == 0:
                return  # another request computed it too; what follows here stays without a name
            self._idle.pop(key, None)
            self._holders[key] = 1
            self._others -= 1
            holding.others -= 1
            holding.named.append(key)

    def free(self, holding: Holding) -> None:
        self._others -= holding.others
        for key in reversed(holding.named):
            self._holders[key] -= 1
            if self._holders[key] == 0:
                del self._holders[key]
                self._idle[key] = None
        holding.named, holding.others = [], 0
