"""A circuit breaker around a remote tier: a server that fails again and again is left alone for a while instead of costing every request
its time-out.

closed     calls go through; `threshold` failures in a row open the breaker
open       calls fail at once, until the back-off has passed
half-open  one call goes through as a trial: success closes the breaker, failure opens it with twice the back-off

An absent key, a full server and a corrupt chunk are answers, not failures of the server.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.base import Tier
from lmc.errors import ConfigError, Corrupt, TierError, TierFull

_log = logging.getLogger(__name__)

State = Literal["closed", "open", "half-open"]


class TierOpen(TierError):
    """The breaker is open; the tier was not asked."""


@dataclass
class BreakerCounters:
    failures: int = 0  # calls that the tier failed
    refusals: int = 0  # calls that were not made
    openings: int = 0  # closed to open


class Breaker:
    """A Tier that passes calls on to another one. Safe for several threads; now() is a monotonic clock in seconds."""

    def __init__(
        self,
        tier: Tier,
        *,
        threshold: int = 3,
        first_wait: float = 0.5,
        longest_wait: float = 30.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if threshold < 1 or not 0 < first_wait <= longest_wait:
            raise ConfigError("a breaker needs threshold >= 1 and 0 < first_wait <= longest_wait")
        self.name = tier.name
        self.counters = BreakerCounters()
        self._tier = tier
        self._threshold = threshold
        self._first_wait = first_wait
        self._longest_wait = longest_wait
        self._now = now
        self._lock = threading.Lock()
        self._state: State = "closed"
        self._in_a_row = 0
        self._wait = first_wait
        self._open_until = 0.0

    @property
    def state(self) -> State:
        return self._state

    def put(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> None:
        with self._call():
            self._tier.put(key, data, parent)

    def get(self, key: ChunkKey, out: memoryview) -> None:
        with self._call():
            self._tier.get(key, out)

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        with self._call():
            return self._tier.contains(keys)

    def delete(self, key: ChunkKey) -> None:
        with self._call():
            self._tier.delete(key)

    def close(self) -> None:
        self._tier.close()

    @contextmanager
    def _call(self) -> Iterator[None]:
        trial = self._admit()
        answered = False
        try:
            yield
            answered = True
        except (KeyError, TierFull, Corrupt):
            answered = True
            raise
        except TierError as error:
            self._failed(trial, error)
            trial = False
            raise
        finally:
            if answered:
                self._succeeded()
            elif trial:
                self._abandoned()

    def _admit(self) -> bool:
        """Whether the call that may go ahead is the trial. Raises TierOpen when no call may."""
        with self._lock:
            if self._state == "closed":
                return False
            left = self._open_until - self._now()
            if self._state == "open" and left <= 0:
                self._state = "half-open"
                return True
            self.counters.refusals += 1
            until = f"for another {left:.1f} s" if self._state == "open" else "until the trial call is answered"
            raise TierOpen(f"{self.name} tier: failed {self._in_a_row} times in a row; left alone {until}")

    def _succeeded(self) -> None:
        with self._lock:
            if self._state != "closed":
                _log.warning("%s tier: answers again", self.name)
            self._state, self._in_a_row, self._wait = "closed", 0, self._first_wait

    def _failed(self, trial: bool, error: TierError) -> None:
        with self._lock:
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
            self._state, self._open_until = "open", self._now() + self._wait

    def _abandoned(self) -> None:
        """The trial ended for a reason that says nothing about the server, such as an interrupt."""
        with self._lock:
            self._state = "open"
