"""Which tenant a chunk belongs to, how many chunks each has in host memory, and which of them is its oldest."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from lmc.cache.directory.recency import Recency


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
        """Learn whose chunk this is; a chunk never changes hands, because the tenant is part of its key."""
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
        """A chunk in host was stored or used."""
        if self._recency is not None:
            self._recency.push(node, self._of[node])

    def at_quota(self, tenant: str) -> bool:
        return self._quota is not None and self._in_host.get(self._ids.get(tenant, -1), 0) >= self._quota

    def oldest(self, tenant: str, holds: Sequence[int]) -> int:
        """The tenant's chunk in host that was touched longest ago and isn't held, or -1."""
        if self._recency is None:
            return -1
        return next((node for node in self._recency.oldest_first(self._ids.get(tenant, -1)) if not holds[node]), -1)
