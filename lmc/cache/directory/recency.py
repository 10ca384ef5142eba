"""Nodes in order of their last touch, in one or several lists: for the time to live, and for the quota of each tenant."""

from __future__ import annotations

from array import array
from collections.abc import Iterator


class Recency:
    """Doubly linked lists over shared arrays; a node is in at most one of them. All operations cost O(1)."""

    def __init__(self, num_nodes: int) -> None:
        self._older = array("i", [-1]) * num_nodes
        self._younger = array("i", [-1]) * num_nodes
        self._list = array("i", [-1]) * num_nodes
        self._oldest: dict[int, int] = {}
        self._youngest: dict[int, int] = {}

    def push(self, node: int, to: int = 0) -> None:
        """Make node the youngest of a list, wherever it was before."""
        self.discard(node)
        older = self._youngest.get(to, -1)
        self._older[node] = older
        if older >= 0:
            self._younger[older] = node
        else:
            self._oldest[to] = node
        self._youngest[to] = node
        self._list[node] = to

    def discard(self, node: int) -> None:
        """Take node out of its list, if it is in one."""
        of = self._list[node]
        if of < 0:
            return
        older, younger = self._older[node], self._younger[node]
        if older >= 0:
            self._younger[older] = younger
        elif younger >= 0:
            self._oldest[of] = younger
        else:
            del self._oldest[of]
        if younger >= 0:
            self._older[younger] = older
        elif older >= 0:
            self._youngest[of] = older
        else:
            del self._youngest[of]
        self._older[node] = self._younger[node] = self._list[node] = -1

    def oldest_first(self, of: int = 0) -> Iterator[int]:
        """The list must not change while it is walked."""
        node = self._oldest.get(of, -1)
        while node >= 0:
            yield node
            node = self._younger[node]
