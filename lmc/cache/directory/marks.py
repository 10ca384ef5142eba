"""Age and tenant of each chunk, with the chunks in order of their touches."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Literal


class Recency:
    """Doubly linked lists over shared arrays; a node is in at most one of them. All operations cost O(1)."""

    def __init__(self, num_nodes: int) -> None:
        self._older = array("i", [-1]) * num_nodes
        self._younger = array("i", [-1]) * num_nodes
        self._list = array("i", [-1]) * num_nodes
        self._oldest: dict[int, int] = {}
        self._youngest: dict[int, int] = {}

    def push(self, node: int, to: int = 0) -> None:
        """Move node to the young end of a list, from wherever it was."""
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
        """Remove node from its list, if it is in one."""
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
        """Walk a list from its oldest node. The list must not change meanwhile."""
        node = self._oldest.get(of, -1)
        while node >= 0:
            yield node
            node = self._younger[node]


TtlMode = Literal["sliding", "fixed"]


class Ages:
    """One time per node: that of its last touch, or in mode "fixed" that of its store. Times never go back."""

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
        """Nodes whose time to live is over, oldest first."""
        nodes: list[int] = []
        if self._order is not None:
            for node in self._order.oldest_first():
                if not self.expired(node, now):
                    break
                nodes.append(node)
        return nodes


class Tenants:
    """Tenants by name; a name is forgotten with its last node. The order of touches is kept only where a quota needs it."""

    def __init__(self, num_nodes: int, host_quota: int | None) -> None:
        self._quota = host_quota
        self._of = array("i", [-1]) * num_nodes
        self._ids: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._nodes: dict[int, int] = {}  # tenant -> its nodes
        self._in_host: dict[int, int] = {}  # tenant -> its chunks in host
        self._last_id = 0
        self._recency = Recency(num_nodes) if host_quota is not None else None

    def assign(self, node: int, tenant: str) -> None:
        """Record the tenant of a chunk. It never changes, because the tenant is part of the key."""
        if self._of[node] >= 0:
            return
        number = self._ids.get(tenant)
        if number is None:
            self._last_id += 1
            number = self._ids[tenant] = self._last_id
            self._names[number] = tenant
        self._of[node] = number
        self._nodes[number] = self._nodes.get(number, 0) + 1

    def forget(self, node: int) -> None:
        number = self._of[node]
        if number < 0:
            return
        self._of[node] = -1
        self._nodes[number] -= 1
        if self._nodes[number] == 0:
            del self._nodes[number]
            del self._ids[self._names.pop(number)]

    def owns(self, tenant: str, node: int) -> bool:
        return self._of[node] >= 0 and self._of[node] == self._ids.get(tenant)

    def entered_host(self, node: int) -> None:
        number = self._of[node]
        self._in_host[number] = self._in_host.get(number, 0) + 1
        self.touched(node)

    def left_host(self, node: int) -> None:
        number = self._of[node]
        self._in_host[number] -= 1
        if self._in_host[number] == 0:
            del self._in_host[number]
        if self._recency is not None:
            self._recency.discard(node)

    def touched(self, node: int) -> None:
        """Record that a chunk in host was stored or touched."""
        if self._recency is not None:
            self._recency.push(node, self._of[node])

    def at_quota(self, tenant: str) -> bool:
        return self._quota is not None and self._in_host.get(self._ids.get(tenant, -1), 0) >= self._quota

    def oldest(self, tenant: str, holds: Sequence[int]) -> int:
        """The tenant's chunk in host that was touched longest ago and is not held, or -1."""
        if self._recency is None:
            return -1
        return next((node for node in self._recency.oldest_first(self._ids.get(tenant, -1)) if not holds[node]), -1)
