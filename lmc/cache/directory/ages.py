"""How long ago chunks were stored or touched, and which have outlived their time."""

from __future__ import annotations

from array import array
from typing import Literal

from lmc.cache.directory.recency import Recency

TtlMode = Literal["sliding", "fixed"]


class Ages:
    """One time per node: of its last touch, or with mode "fixed" of its store. Times never go back."""

    def __init__(self, num_nodes: int, ttl: float | None, mode: TtlMode) -> None:
        self.ttl = ttl
        self._sliding = mode == "sliding"
        self._time = array("d", bytes(8 * num_nodes))
        self._order = Recency(num_nodes) if ttl is not None else None

    def born(self, node: int, now: float) -> None:
        self._time[node] = now
        if self._order is not None:
            self._order.push(node)

    def touched(self, node: int, now: float) -> None:
        if self._sliding or self.expired(node, now):
            self.born(node, now)

    def gone(self, node: int) -> None:
        if self._order is not None:
            self._order.discard(node)

    def idle(self, node: int, now: float) -> float:
        return max(0.0, now - self._time[node])

    def expired(self, node: int, now: float) -> bool:
        return self.ttl is not None and now - self._time[node] > self.ttl

    def all_expired(self, now: float) -> list[int]:
        """Oldest first."""
        nodes: list[int] = []
        if self._order is not None:
            for node in self._order.oldest_first():
                if not self.expired(node, now):
                    break
                nodes.append(node)
        return nodes
