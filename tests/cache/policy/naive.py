"""Each policy once more, as plainly as possible: lists, dicts and sorting, no arrays and no constant-time tricks.

Where a policy sets nodes with children aside until the children are gone, so does its naive twin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.cache.policy.naive_queues import Naive2Q, NaiveArc, NaiveLirs, NaiveS3Fifo, NaiveSieve
from tests.contracts.policy import IsBlocked, Key, Policy


class Naive:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.clock = 0
        self.order: dict[Key, float] = {}

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def begin(self, request_class: int) -> None:
        """What it evicts does not depend on the class."""

    def settle(self, chain: Sequence[Key]) -> None:
        pass

    def first(self, held: IsBlocked) -> Key | None:
        free = [key for key in self.order if not held(key)]
        return min(free, key=lambda key: self.order[key], default=None)


class NaiveFifo(Naive):
    def hit(self, key: Key, now: int) -> None:
        pass

    def insert(self, key: Key, now: int) -> None:
        self.order[key] = self.tick()

    def victim(self, held: IsBlocked) -> Key | None:
        return self.first(held)

    def evict(self, key: Key) -> None:
        del self.order[key]


class NaiveLru(NaiveFifo):
    def hit(self, key: Key, now: int) -> None:
        self.order[key] = self.tick()


class NaiveLfu(NaiveLru):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.touches: dict[Key, int] = {}

    def hit(self, key: Key, now: int) -> None:
        super().hit(key, now)
        self.touches[key] += 1

    def insert(self, key: Key, now: int) -> None:
        super().insert(key, now)
        self.touches[key] = 1

    def first(self, held: IsBlocked) -> Key | None:
        free = [key for key in self.order if not held(key)]
        return min(free, key=lambda key: (self.touches[key], self.order[key]), default=None)


class NaiveGdsf(NaiveLfu):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.value: dict[Key, float] = {}
        self.least: dict[Key, float] = {}  # what a block's children made it worth
        self.aged = 0.0

    def appraise(self, key: Key) -> None:
        self.value[key] = max(self.aged + self.touches[key] * (1 + len(key) / 128), self.least.get(key, 0.0))
        self.least[key[:-1]] = max(self.least.get(key[:-1], 0.0), self.value[key])

    def hit(self, key: Key, now: int) -> None:
        super().hit(key, now)
        self.appraise(key)

    def insert(self, key: Key, now: int) -> None:
        super().insert(key, now)
        self.appraise(key)

    def victim(self, held: IsBlocked) -> Key | None:
        free = [key for key in self.order if not held(key)]
        return min(free, key=lambda key: (self.value[key], self.order[key]), default=None)

    def evict(self, key: Key) -> None:
        super().evict(key)
        self.aged = max(self.aged, self.value[key])
        self.least.pop(key, None)


NAIVE: dict[str, Callable[[int], Policy]] = {
    "lru": NaiveLru,
    "fifo": NaiveFifo,
    "lfu": NaiveLfu,
    "sieve": NaiveSieve,
    "s3fifo": NaiveS3Fifo,
    "arc": NaiveArc,
    "lirs": NaiveLirs,
    "2q": Naive2Q,
    "gdsf": NaiveGdsf,
}
