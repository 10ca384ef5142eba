"""What the last requests took from the cache and how long that took, one span each. A client joins them with its own times by request id.

Written on the scheduler's thread, read by the endpoint's threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

KEEP = 8192


class Span(NamedTuple):
    """Times are seconds on the engine's clock. Loads add up batches; of several ranks, bytes add up and the slowest one's time counts."""

    request: str
    tokens: int  # of the prompt
    hit_tokens: dict[str, int]  # by tier; "device" is the engine's own prefix cache
    miss: str | None  # why the hit ended before the prompt's last chunk
    asked_s: float  # the first lookup
    answered_s: float  # its answer: remote tiers were asked, and lower tiers read into host memory
    admitted_s: float  # the engine took the request in; only then it is loaded
    load_bytes: int = 0
    load_seconds: float = 0.0


class Spans:
    """The newest `keep` requests that were admitted."""

    def __init__(self, clock: Callable[[], float], keep: int = KEEP) -> None:
        self._clock = clock
        self._keep = keep
        self._spans: dict[str, Span] = {}  # by request, oldest first
        self._lock = threading.Lock()

    def add(self, span: Span) -> None:
        with self._lock:
            self._spans.pop(span.request, None)
            self._spans[span.request] = span
            if len(self._spans) > self._keep:
                del self._spans[next(iter(self._spans))]

    def loaded(self, loads: Mapping[str, tuple[int, float]]) -> None:
        """Bytes and seconds by request; of requests that are not among the newest, nothing is kept."""
        with self._lock:
            for request, (num_bytes, seconds) in loads.items():
                if (span := self._spans.get(request)) is not None:
                    self._spans[request] = span._replace(
                        load_bytes=span.load_bytes + num_bytes, load_seconds=span.load_seconds + seconds
                    )

    def read(self, newest: int = KEEP) -> dict[str, object]:
        """The newest spans, oldest of them first, and what the clock says now."""
        with self._lock:  # held for no longer than a copy of references: the scheduler's thread waits for it
            spans = list(self._spans.values())
        return {"now_s": self._clock(), "requests": [span._asdict() for span in spans[max(0, len(spans) - newest) :]]}
