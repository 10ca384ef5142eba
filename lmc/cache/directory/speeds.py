"""How fast the tiers and the engine are at present: running estimates from what was measured. It reads no clock; times are passed in.

What was not measured yet has no estimate. A tier may turn slow or quick at any time, so only its last few measurements count. Passes of the
engine change less, and are of many sizes, so for each size the last measurements are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmc.cache.directory.holds import Ticket
from lmc.cache.directory.places import HOST
from lmc.cache.directory.prefill import PrefillTimes

RETRY_SECONDS = 10.0  # a tier that is left alone is tried again so long after the last try
_WEIGHT = 0.5  # of a measurement against those before: a tier that turns slow is known to be slow within few requests
_MOST_CHANGE = 1_000.0  # no measurement changes an estimate by more than this factor


class Link:
    """Seconds until chunks of a tier are there: a latency, and the transfer of each chunk.

    A measurement that is longer or shorter than expected corrects each of the two by its share in what was expected, so measurements of
    different sizes tell them apart.
    """

    def __init__(self) -> None:
        self._latency = self._each = 1.0  # up to a factor, which the first measurement gives
        self._measured = False

    def seconds(self, chunks: float) -> float | None:
        """None before the first measurement."""
        return self._latency + chunks * self._each if self._measured else None

    def learn(self, chunks: float, seconds: float) -> None:
        if seconds <= 0 or chunks <= 0:
            return
        expected = self._latency + chunks * self._each
        ratio = seconds / expected
        if self._measured:
            ratio = min(max(ratio, 1 / _MOST_CHANGE), _MOST_CHANGE)
            share = self._latency / expected
            self._latency *= ratio ** (_WEIGHT * share)
            self._each *= ratio ** (_WEIGHT * (1 - share))
        else:
            self._measured = True
            self._latency *= ratio
            self._each *= ratio


@dataclass(slots=True)
class _Batch:
    """Chunks of one tier that were asked for together."""

    tier: str
    began: float
    chunks: int  # with those of the tier that were under way before
    left: int
    seconds: float = 0.0  # until the last one that has ended was there
    whole: bool = True  # none of them failed


class Speeds:
    def __init__(self) -> None:
        self._links: dict[str, Link] = {}
        self._tried: dict[str, float] = {}  # tier -> when it was last asked for chunks
        self._under_way: Counter[str] = Counter()  # chunks by tier
        self._batches: dict[int, _Batch] = {}  # by operation, oldest first
        self._prefill = PrefillTimes()

    # What was measured

    def staging(self, tickets: Iterable[Ticket], now: float) -> None:
        """These chunks are asked for in the tiers below the host."""
        batches: dict[str, _Batch] = {}
        for ticket in tickets:
            tier = ticket.tier
            batch = batches.get(tier)
            if batch is None:
                batch = batches[tier] = _Batch(tier, now, self._under_way[tier], 0)
            batch.chunks += 1
            batch.left += 1
            self._under_way[tier] += 1
            self._batches[ticket.operation] = batch
            self._tried[tier] = now

    def staged(self, operation: int, now: float, seconds: float | None, *, failed: bool) -> None:
        """An operation ended; if it was one of these, its tier may have shown how fast it is. seconds: if it ended before now."""
        batch = self._batches.pop(operation, None)
        if batch is None:
            return
        self._under_way[batch.tier] -= 1
        batch.left -= 1
        batch.seconds = max(batch.seconds, now - batch.began if seconds is None else seconds)
        batch.whole = batch.whole and not failed
        if batch.left:
            return
        link = self._link(batch.tier)
        if batch.whole or batch.seconds > (
            link.seconds(batch.chunks) or float("inf")
        ):  # one that gave up early shows nothing
            link.learn(batch.chunks, batch.seconds)

    def loaded(self, chunks: float, seconds: float) -> None:
        """So many chunks were copied from host memory to the engine."""
        self._link(HOST).learn(chunks, seconds)

    def computed(self, parts: Sequence[tuple[int, int]], seconds: float) -> None:
        """A pass with a prompt is over. parts: of each request, the position of its first token and the number of its tokens."""
        self._prefill.learn(parts, seconds)

    # What is expected

    def computing(self, position: int, new: int) -> float | None:
        """Seconds to compute `new` tokens after `position` others; None before a pass was measured."""
        return self._prefill.seconds(position, new)

    def loading(self, tier: str, chunks: int, now: float) -> float:
        """Seconds until so many more chunks of a tier are there; for a tier that was not measured yet, those of its oldest request."""
        if not chunks:
            return 0.0
        expected = self._link(tier).seconds(self._under_way[tier] + chunks) or 0.0
        oldest = next((batch for batch in self._batches.values() if batch.tier == tier), None)
        return expected if oldest is None else max(expected, now - oldest.began)

    def to_be_tried(self, tier: str, now: float) -> bool:
        """Whether a tier that is left alone should show again how fast it is."""
        return now - self._tried.get(tier, float("-inf")) >= RETRY_SECONDS

    def _link(self, tier: str) -> Link:
        if tier not in self._links:
            self._links[tier] = Link()
        return self._links[tier]
