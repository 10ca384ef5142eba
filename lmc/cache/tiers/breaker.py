"""A circuit breaker around a tier: a medium that fails, hangs or only dawdles is left alone for a while instead of costing every request
its time-out.

closed     calls go through; `threshold` failures in a row open the breaker, and so does one call that never ends
open       calls fail at once, until the back-off has passed
half-open  one call goes through as a trial: success closes the breaker, failure opens it with twice the back-off

Reads and writes have a circuit each: a server that refuses writes may well be read. An absent key, a full server and a corrupt chunk are
answers, not failures of the medium; a read that took longer than it may is a failure, although it brought its chunk.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.base import BoundedTier, Tier
from lmc.cache.tiers.lent import Borrower, LentMemory
from lmc.cache.tiers.stored import Moved
from lmc.errors import ConfigError, Corrupt, TierError, TierFull

_log = logging.getLogger(__name__)

State = Literal["closed", "open", "half-open"]
Direction = Literal["read", "write"]
DIRECTIONS: tuple[Direction, ...] = ("read", "write")
SLOWEST = (
    16 << 20
)  # bytes per second; a chunk may take as long as this rate needs for it, and the time that any call may take


class TierOpen(TierError):
    """The breaker is open; the tier was not asked."""


@dataclass
class BreakerCounters:
    failures: int = 0  # calls that the tier failed, those that were too slow or never ended among them
    refusals: int = 0  # calls that were not made
    openings: int = 0  # closed to open


@dataclass
class _Call:
    started: float
    overdue: float  # when the call counts as one that never ends
    trial: bool


class Circuit:
    """The state of one direction. Safe for several threads; now() is a monotonic clock in seconds."""

    def __init__(
        self, what: str, threshold: int, first_wait: float, longest_wait: float, now: Callable[[], float]
    ) -> None:
        self.counters = BreakerCounters()
        self._what = what
        self._threshold = threshold
        self._first_wait = first_wait
        self._longest_wait = longest_wait
        self._now = now
        self._lock = threading.Lock()
        self._state: State = "closed"
        self._in_a_row = 0
        self._wait = first_wait
        self._open_until = 0.0
        self._calls: dict[int, _Call] = {}  # under way and not overdue
        self._last = 0

    @property
    def state(self) -> State:
        with self._lock:
            self._note_overdue(self._now())
            return self._state

    @property
    def refuses(self) -> bool:
        """Whether a call would be refused now."""
        with self._lock:
            now = self._now()
            self._note_overdue(now)
            return self._state == "half-open" or (self._state == "open" and now < self._open_until)

    @contextmanager
    def call(self, patience: float, slow: float) -> Iterator[None]:
        """patience: seconds after which the call is taken for one that never ends. slow: seconds after which its success is a failure."""
        number = self._admit(patience)
        answered = False
        try:
            yield
            answered = True
        except (KeyError, TierFull, Corrupt):
            answered = True
            raise
        except TierError as error:
            self._ended(number, str(error))
            raise
        finally:
            if answered:
                self._ended(number, None, slow)
            else:
                self._abandoned(number)

    def _admit(self, patience: float) -> int:
        """Raises TierOpen when the call may not be made."""
        with self._lock:
            now = self._now()
            self._note_overdue(now)
            trial = self._state == "open" and now >= self._open_until
            if self._state != "closed" and not trial:
                self.counters.refusals += 1
                left = self._open_until - now
                until = f"for another {left:.1f} s" if self._state == "open" else "until the trial call is answered"
                raise TierOpen(f"{self._what}: failed {self._in_a_row} times in a row; left alone {until}")
            if trial:
                self._state = "half-open"
            self._last += 1
            self._calls[self._last] = _Call(now, now + patience, trial)
            return self._last

    def _ended(self, number: int, error: str | None, slow: float = math.inf) -> None:
        with self._lock:
            now = self._now()
            call = self._calls.pop(number, None)
            if call is None:
                return  # it was overdue, and has been counted
            if error is None and now - call.started > slow:
                error = f"{self._what}: a call took {now - call.started:.1f} s, more than {slow:.1f} s"
            if error is not None:
                self._failed(call.trial, error, now)
                return
            if self._state != "closed":
                _log.warning("%s: answers again", self._what)
            self._state, self._in_a_row, self._wait = "closed", 0, self._first_wait

    def _failed(self, trial: bool, error: str, now: float) -> None:
        self.counters.failures += 1
        self._in_a_row += 1
        if trial:
            self._wait = min(self._wait * 2, self._longest_wait)
        elif self._state != "closed" or self._in_a_row < self._threshold:
            return
        else:
            self.counters.openings += 1
            _log.warning(
                "%s; %d failures in a row, so the tier is left alone for %g s", error, self._in_a_row, self._wait
            )
        self._state, self._open_until = "open", now + self._wait

    def _note_overdue(self, now: float) -> None:
        """A call that never ends holds a thread for ever, so the first one is enough to open the breaker."""
        for number, call in list(self._calls.items()):
            if now <= call.overdue:
                continue
            del self._calls[number]
            self._in_a_row = max(self._in_a_row, self._threshold - 1)
            seconds = call.overdue - call.started
            self._failed(call.trial, f"{self._what}: a call has had no answer for {seconds:g} s", now)

    def _abandoned(self, number: int) -> None:
        """The call ended for a reason that says nothing about the medium, such as an interrupt."""
        with self._lock:
            call = self._calls.pop(number, None)
            if call is not None and call.trial:
                self._state = "open"


class Breaker:
    """A Tier that passes calls on to another one.

    patience: seconds after which a call is taken for one that never ends. slow: seconds that a read may take. Both are for a call without
    bytes; a chunk may take longer by what SLOWEST allows.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        threshold: int = 3,
        first_wait: float = 0.5,
        longest_wait: float = 30.0,
        patience: float = 5.0,
        slow: float = 0.5,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if threshold < 1 or not 0 < first_wait <= longest_wait or not 0 < slow <= patience:
            raise ConfigError("a breaker needs threshold >= 1, 0 < first_wait <= longest_wait and 0 < slow <= patience")
        self.name = tier.name
        self._tier = tier
        self._patience = patience
        self._slow = slow
        self._circuits: dict[Direction, Circuit] = {
            direction: Circuit(f"{tier.name} tier, {direction}s", threshold, first_wait, longest_wait, now)
            for direction in DIRECTIONS
        }

    @property
    def borrows(self) -> bool:
        """Whether lend() is of use to the tier."""
        return isinstance(self._tier, Borrower)

    def lend(self, memory: LentMemory) -> None:
        """Tell a tier that can move chunks in such memory without a copy; no other tier cares."""
        if isinstance(self._tier, Borrower):
            self._tier.lend(memory)

    def state(self, direction: Direction) -> State:
        return self._circuits[direction].state

    def counters(self, direction: Direction) -> BreakerCounters:
        return self._circuits[direction].counters

    def refuses(self, direction: Direction) -> bool:
        """Whether a call would fail at once."""
        return self._circuits[direction].refuses

    def patience(self, num_bytes: int) -> float:
        """Seconds after which a call that moves so many bytes is taken for one that never ends."""
        return self._patience + num_bytes / SLOWEST

    def put(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> Moved:
        with self._write(len(data)):
            return self._tier.put(key, data, parent)

    def get(self, key: ChunkKey, out: memoryview) -> Moved:
        with self._read(len(out)):
            return self._tier.get(key, out)

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        with self._read():
            return self._tier.contains(keys)

    def delete(self, key: ChunkKey) -> None:
        with self._write():
            self._tier.delete(key)

    def close(self) -> None:
        self._tier.close()

    def _read(self, num_bytes: int = 0) -> AbstractContextManager[None]:
        return self._circuits["read"].call(self.patience(num_bytes), self._slow + num_bytes / SLOWEST)

    def _write(self, num_bytes: int = 0) -> AbstractContextManager[None]:
        """Nobody waits for a write, so it may be slow."""
        return self._circuits["write"].call(self.patience(num_bytes), math.inf)


class BoundedBreaker(Breaker):
    """The same around a BoundedTier."""

    def __init__(self, tier: BoundedTier, *, patience: float = 5.0, slow: float = 0.5) -> None:
        super().__init__(tier, patience=patience, slow=slow)
        self._bounded = tier

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        with self._circuits["read"].call(math.inf, math.inf):  # it takes as long as there are chunks
            found = list(self._bounded.scan())
        return iter(found)

    @property
    def progress(self) -> int:
        return self._bounded.progress

    @property
    def is_open(self) -> bool:
        return self._bounded.is_open

    def parents(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, ChunkKey]:
        return self._bounded.parents(keys)
