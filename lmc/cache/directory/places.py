"""Bookkeeping of nodes and places: host slots, states in each tier, parents, and the holds on each chunk.

It does not know requests or write modes. A chunk in a tier holds its parent there and in the tiers below: each tier holds whole prefixes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from lmc.cache.directory.changes import Changes
from lmc.cache.directory.marks import Ages, Tenants, TtlMode
from lmc.cache.directory.misses import MissLog
from lmc.cache.directory.nodes import ABSENT, RESIDENT, SPOILED, Capacity, Nodes, ResidentSet
from lmc.cache.keys import ChunkKey
from lmc.cache.policy.base import PolicySpec

HOST = "host"
_MOST_TOUCHES = 65_535  # that are told apart
_SPARE_NODES = 64  # chunks that hold no place while their deletion, children or pins still refer to them


class Places:
    def __init__(
        self,
        host_slots: int,
        below: Mapping[str, Capacity],
        spec: PolicySpec,
        *,
        ttl: float | None,
        ttl_mode: TtlMode,
        tenant_quota: int | None,
    ) -> None:
        places = host_slots + sum(capacity.chunks for capacity in below.values())
        num_nodes = int(places * (1 + spec.ghosts)) + places // 16 + _SPARE_NODES
        self.parents = array("i", [-1]) * num_nodes
        view = np.frombuffer(self.parents, dtype=np.int32)
        self.host = ResidentSet(HOST, Capacity.of_chunks(host_slots), num_nodes, spec, view)
        self.below = [ResidentSet(name, capacity, num_nodes, spec, view) for name, capacity in below.items()]
        self.sets = [self.host, *self.below]
        self.nodes = Nodes(num_nodes)
        self.ages = Ages(num_nodes, ttl, ttl_mode)
        self.tenants = Tenants(num_nodes, tenant_quota)
        self.misses = MissLog()
        self.changes = Changes()
        self.access = 0  # number of the request: the policies' clock
        self.slots = array("i", [-1]) * num_nodes
        self.groups = bytearray(num_nodes)  # which part of its chunk a node is; known before it comes into host
        self.unreached: set[int] = set()  # nodes below the host that could not be brought up when they were wanted
        self.touches = array("H", bytes(2 * num_nodes))
        self._free_slots: list[int] = []
        self._fresh_slot = 0  # slots from here on were never taken
        self._stranded: set[int] = set()
        self._num_withheld = 0  # slots that are not there for now
        self._recalled: set[int] = set()  # slots in use that will not be there when they are free

    # Asking

    @property
    def num_slots(self) -> int:
        """Host slots that are there now."""
        return self.host.capacity - self._num_withheld

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots) + self.host.capacity - self._fresh_slot

    def set_of(self, tier: str) -> ResidentSet | None:
        return next((residents for residents in self.sets if residents.name == tier), None)

    def present(self, node: int) -> bool:
        """Whether the chunk is in a tier, or on its way into one."""
        return any(residents.present(node) for residents in self.sets)

    def parent_key(self, node: int) -> ChunkKey | None:
        """Key of the chunk before it, or None for the first chunk of a prefix."""
        parent = self.parents[node]
        return self.nodes.key(parent) if parent >= 0 else None

    def tier_below(self, node: int) -> str | None:
        """The fastest tier below the host from which the chunk can be read."""
        for residents in self.below:
            if residents.state[node] == RESIDENT:
                return residents.name
        return None

    def in_use(self, node: int) -> bool:
        return any(residents.holds[node] for residents in self.sets)

    # Nodes

    def add(self, key: ChunkKey, parent: int, now: float) -> int:
        node = self.nodes.add(key)
        self.parents[node] = parent
        self.touches[node] = 0
        self.ages.born(node, now)
        return node

    def forget_unused(self, node: int) -> None:
        """Free a node if nothing refers to it any more."""
        if self.nodes.keys[node] is not None and all(residents.unused(node) for residents in self.sets):
            self.nodes.remove(node)
            self.unreached.discard(node)
            self.ages.gone(node)
            self.tenants.forget(node)

    def forget_ghosts(self) -> None:
        for residents in self.sets:
            for node in residents.forgettable():
                self.forget_unused(node)

    def adopt(self, node: int, parent: int, tenant: str) -> None:
        """Record the parent and the tenant of a chunk that a scan found."""
        self.tenants.assign(node, tenant)
        if self.parents[node] < 0 <= parent:
            self.parents[node] = parent
            for residents in self.sets:
                if residents.present(node):
                    self._hold_parent(node, residents, 1)

    def subtree(self, root: int) -> list[int]:
        """The chunk and all chunks that continue it. It walks all nodes."""
        children: dict[int, list[int]] = {}
        for node in self.nodes:
            if self.present(node):
                children.setdefault(self.parents[node], []).append(node)
        found = [root]
        for node in found:
            found += children.get(node, ())
        return found

    # Holds

    def hold(self, nodes: Iterable[int], by: int) -> None:
        """Add a hold (by=1) to each node that is not -1, which keeps it from eviction, or remove one (by=-1)."""
        for residents in self.sets:
            holds = residents.holds
            for node in nodes:
                if node >= 0:
                    holds[node] += by

    def hold_one(self, node: int, by: int) -> None:
        """Add or remove one hold on a node. -1 is skipped: a chunk that only a remote tier holds has no node."""
        if node >= 0:
            for residents in self.sets:
                residents.holds[node] += by

    def _hold_parent(self, node: int, upper: ResidentSet, by: int) -> None:
        parent = self.parents[node]
        if parent >= 0:
            for residents in self.sets if upper is self.host else self.sets[self.sets.index(upper) :]:
                residents.holds[parent] += by
            if by < 0:
                self.forget_unused(parent)

    # Places

    def enter(self, residents: ResidentSet, node: int, size: int | None = None) -> None:
        """Reserve a place of that size, or of that of a chunk that is not compressed."""
        residents.reserve(node, residents.chunk_bytes if size is None else size)
        self._hold_parent(node, residents, 1)

    def arrive(self, residents: ResidentSet, node: int) -> None:
        """Mark the chunk as readable."""
        residents.state[node] = RESIDENT
        if self.changes.watched:
            self.changes.note(residents.name, self.nodes.key(node), readable=True)

    def leave(self, residents: ResidentSet, node: int) -> None:
        """Make the chunk unreadable and tell the policy. Its place stays taken."""
        residents.retire(node)
        if self.changes.watched:
            self.changes.note(residents.name, self.nodes.key(node), readable=False)
        self._hold_parent(node, residents, -1)

    def take_slot(self, node: int) -> None:
        self.enter(self.host, node)
        if self._free_slots:
            self.slots[node] = self._free_slots.pop()
        else:
            self.slots[node] = self._fresh_slot
            self._fresh_slot += 1
        self.tenants.entered_host(node)

    def leave_host(self, node: int) -> None:
        self.free_stranded(self.strand_slot(node))
        self.forget_unused(node)

    def strand_slot(self, node: int) -> int:
        """The chunk leaves the host, but its slot is not free: something may still be written there. Returns the slot."""
        self.leave(self.host, node)
        self.host.vacate(node)
        self.tenants.left_host(node)
        slot, self.slots[node] = self.slots[node], -1
        self._stranded.add(slot)
        return slot

    def free_stranded(self, slot: int) -> None:
        self._stranded.remove(slot)
        if slot in self._recalled:
            self._recalled.remove(slot)
            self._num_withheld += 1
        else:
            self._free_slots.append(slot)

    def withhold_all(self) -> None:
        assert self._fresh_slot == 0
        self._fresh_slot = self._num_withheld = self.host.capacity

    def give_slots(self, slots: range) -> None:
        self._num_withheld -= len(slots)
        self._free_slots.extend(reversed(slots))

    def recall_slots(self, slots: range) -> None:
        free = [slot for slot in self._free_slots if slot not in slots]
        self._num_withheld += len(self._free_slots) - len(free)
        self._free_slots = free
        self._recalled.update(self.slots[node] for node in self.nodes_in(slots))
        self._recalled.update(slot for slot in self._stranded if slot in slots)

    def nodes_in(self, slots: range) -> list[int]:
        """The chunks in these host slots, readable or not."""
        view = np.frombuffer(self.slots, dtype=np.int32)
        return [int(node) for node in np.flatnonzero((view >= slots.start) & (view < slots.stop))]

    def num_recalled(self, slots: range) -> int:
        """How many of these slots are still in use."""
        return sum(slot in self._recalled for slot in slots)

    def begin_access(self, request_class: int) -> None:
        """What is touched and inserted from now on is a request's of this class (0: nothing is known of it)."""
        self.access += 1
        for residents in self.sets:
            residents.begin_access(request_class)

    def insert(self, residents: ResidentSet, nodes: Sequence[int]) -> None:
        """Tell the policy of new chunks, from the last to the first, as touches do."""
        for node in reversed(nodes):
            residents.insert(node, self.access)

    def touch(self, nodes: Sequence[int], now: float) -> None:
        """Touch chunks from the last to the first, so that a parent is younger than its child."""
        in_host = self.host.state
        for node in reversed(nodes):
            for residents in self.sets:
                residents.touch(node, self.access)
            self.count_touch(node)
            self.ages.touched(node, now)
            if in_host[node] != ABSENT:
                self.tenants.touched(node)

    def count_touch(self, node: int) -> None:
        if self.touches[node] < _MOST_TOUCHES:
            self.touches[node] += 1

    # Invariants

    def check(self, idle: bool) -> None:
        """Assert the invariants. idle: no operation is open and no pin is held, so all holds come from children."""
        slots = [self.slots[node] for node in self.nodes if self.slots[node] >= 0]
        assert len(slots) == len(set(slots)) and not set(slots) & set(self._free_slots)
        assert len(slots) + self.num_free_slots + len(self._stranded) + self._num_withheld == self.host.capacity
        assert all(slot < self._fresh_slot for slot in slots)
        for index, residents in enumerate(self.sets):
            taken = [node for node in self.nodes if residents.state[node] != ABSENT]
            assert residents.count == len(taken) <= residents.capacity
            assert residents.bytes_taken == sum(residents.sizes[node] for node in taken) <= residents.num_bytes
            assert residents.bytes_taken == sum(residents.sizes) and all(residents.sizes[node] > 0 for node in taken)
            children = array("i", bytes(4 * len(self.parents)))
            for node, above in self._held_down_to(index):
                parent = self.parents[node]
                if parent >= 0:
                    children[parent] += 1
                    assert self.nodes.keys[parent] is not None, f"the parent of {node} in {above.name} was forgotten"
            for node in range(len(self.parents)):
                assert residents.holds[node] >= children[node]
                assert not idle or residents.holds[node] == children[node]
        if idle:
            for node in self.nodes:
                assert not all(residents.unused(node) for residents in self.sets), f"node {node} leaks"

    def _held_down_to(self, index: int) -> Iterator[tuple[int, ResidentSet]]:
        for residents in self.sets[: index + 1]:
            for node in self.nodes:
                if residents.present(node) or residents.state[node] == SPOILED:
                    yield node, residents
