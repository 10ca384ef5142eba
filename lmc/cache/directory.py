"""The directory: which chunk is in which tier and slot, who has it pinned, what goes next.

It does no I/O, holds no bytes, takes no lock and reads no clock; it lives on the engine's scheduler thread. It hands out *tickets* (what is
to be copied) and believes only what complete() reports. The simulator runs this very object.

A chunk is a *node*, a small integer, in every tier. Tiers stay prefix-closed: a parent is blocked from eviction while a child is there.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import numpy as np

from lmc.cache.keys import ChunkKey
from lmc.cache.policy.base import Parents, PolicySpec
from lmc.cache.resident import ABSENT, INCOMING, RESIDENT, ResidentSet

HOST = "host"
_MISSES_REMEMBERED = 16_384


class Miss(StrEnum):
    """Why the first absent chunk of a lookup is absent."""

    NEVER_STORED = "never stored"
    EVICTED = "evicted"
    EXPIRED = "expired"
    LOAD_FAILED = "load failed"
    STORE_FAILED = "store failed"
    IN_FLIGHT = "store in flight"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class Found:
    """Answer of a lookup: the tier of each chunk of the longest stored prefix, fastest first, and why it ends there."""

    tiers: tuple[str, ...]
    miss: Miss | None

    @property
    def num_chunks(self) -> int:
        return len(self.tiers)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A copy to make: store (blocks to slot), load (slot to blocks), write (slot to tier), stage (tier to slot), delete (in tier)."""

    operation: int
    kind: Literal["store", "write", "stage", "delete", "load"]
    key: ChunkKey
    tier: str
    slot: int
    evict: tuple[ChunkKey, ...] = ()


@dataclass(slots=True)
class _Open:
    ticket: Ticket
    node: int
    evict: tuple[int, ...] = ()
    demotes: bool = False


@dataclass
class Counts:
    """Totals since the start."""

    stores_dropped: int = 0  # chunks for which no slot was free
    writes_dropped: int = 0  # chunks not written below: queue full, or no room
    evicted: dict[str, int] = field(default_factory=dict)  # by tier


class Directory:
    """host_slots fixed slots in host memory and, below it, bounded tiers in order of speed (name to capacity in chunks)."""

    def __init__(
        self,
        host_slots: int,
        below: dict[str, int],
        spec: PolicySpec,
        *,
        write: Literal["through", "back", "around"] = "through",
        write_touches: int = 2,
        ttl: float | None = None,
        queue_depth: int = 1024,
    ) -> None:
        places = host_slots + sum(below.values())
        num_nodes = int(places * (1 + spec.ghosts)) + 1
        self._parent: Parents = np.full(num_nodes, -1, dtype=np.int32)
        self._host = ResidentSet(HOST, host_slots, num_nodes, spec, self._parent)
        self._below = [ResidentSet(name, capacity, num_nodes, spec, self._parent) for name, capacity in below.items()]
        self._sets = [self._host, *self._below]
        self._write = write
        self._write_touches = write_touches
        self._ttl = ttl
        self._queue_depth = queue_depth
        self._reserve = max(1, host_slots // 8) if write == "back" and below else 0

        self._nodes: dict[ChunkKey, int] = {}
        self._keys: list[ChunkKey | None] = [None] * num_nodes
        self._slot = array("i", [-1]) * num_nodes
        self._touches = array("H", [0]) * num_nodes
        self._free_nodes = list(range(num_nodes - 1, -1, -1))
        self._free_slots = list(range(host_slots - 1, -1, -1))
        self._age: OrderedDict[int, float] = OrderedDict()  # node -> last touch, oldest first; only with a ttl
        self._open: dict[int, _Open] = {}
        self._num_writes = 0
        self._staging: set[int] = set()
        self._evicting: set[int] = set()  # nodes that an open write deletes from its tier first
        self._pins: dict[str, tuple[list[int], float]] = {}
        self._misses: OrderedDict[ChunkKey, Miss] = OrderedDict()
        self._last_operation = 0
        self._access = 0  # the number of the request, which is the policies' clock
        self._outbox: list[Ticket] = []
        self.counts = Counts()

    # Looking up

    def lookup(self, keys: Sequence[ChunkKey], now: float) -> Found:
        """The longest prefix of keys whose chunks are readable. Changes nothing."""
        tiers: list[str] = []
        for key in keys:
            node = self._nodes.get(key, -1)
            if node < 0 or self._expired(node, now):
                return Found(tuple(tiers), self._why(key, node, now))
            if self._host.state[node] == RESIDENT:
                tiers.append(HOST)
                continue
            tier = self._below_tier(node)
            if tier is None:
                return Found(tuple(tiers), self._why(key, node, now))
            tiers.append(tier)
        return Found(tuple(tiers), None)

    def tiers_of(self, key: ChunkKey) -> list[str]:
        """Every tier from which the chunk can be read."""
        node = self._nodes.get(key, -1)
        return [residents.name for residents in self._sets if node >= 0 and residents.readable(node)]

    # Moving chunks

    def store(self, keys: Sequence[ChunkKey], now: float, *, touch: bool = True) -> list[Ticket]:
        """A request holds the chunks of keys, a whole prefix: touch what is stored, make room for what is not.

        Inserts and touches go from the last chunk to the first, so a parent is younger than its child. Returns a store ticket for each
        chunk that got a slot, in order of the prefix; where slots run out, the rest is dropped.
        """
        self._access += 1
        chain = self._chain(keys)
        self._block(chain, 1)
        tickets: list[Ticket] = []
        new: list[int] = []
        stored: list[int] = []
        for index, key in enumerate(keys):
            node = chain[index]
            if node >= 0 and self._somewhere(node):
                self._link(node, chain[index - 1] if index else -1)
                stored.append(node)
                continue
            if not self._make_room() or (node < 0 and not self._free_nodes):
                self.counts.stores_dropped += len(keys) - index
                break
            if node < 0:
                node = chain[index] = self._new_node(key)
                self._block([node], 1)
            self._parent[node] = chain[index - 1] if index else -1
            self._take_slot(node)
            tickets.append(self._ticket("store", node, HOST))
            new.append(node)
        self._insert(self._host, new, now)
        if touch:
            self._touch(stored, now)
        self._block(chain, -1)
        self._forget_ghosts()
        self._demote_ahead()
        return tickets

    def stage(self, keys: Sequence[ChunkKey], now: float) -> list[Ticket]:
        """Bring chunks from lower tiers into host slots, as many of the leading ones as find room; those in host already are skipped."""
        self._access += 1
        chain = self._chain(keys)
        self._block(chain, 1)
        tickets: list[Ticket] = []
        new: list[int] = []
        for node in chain:
            if node >= 0 and self._host.state[node] != ABSENT:
                continue
            tier = self._below_tier(node) if node >= 0 else None
            if tier is None or not self._make_room():
                break
            self._take_slot(node)
            tickets.append(self._ticket("stage", node, tier))
            self._staging.add(node)
            new.append(node)
        self._insert(self._host, new, now)
        self._block(chain, -1)
        self._forget_ghosts()
        return tickets

    def arriving(self, keys: Sequence[ChunkKey]) -> bool:
        """True while some of keys are on their way into host slots."""
        return any(node >= 0 and self._host.state[node] == INCOMING for node in self._chain(keys))

    def num_settled(self, keys: Sequence[ChunkKey]) -> int:
        """Leading chunks of keys that are stored or being stored; one that is still being staged may yet turn out to be corrupt."""
        for index, node in enumerate(self._chain(keys)):
            if node in self._staging:
                return index
        return len(keys)

    def load(self, keys: Sequence[ChunkKey]) -> list[Ticket]:
        """Promise that the host slots of keys stay as they are until the returned operations complete. All keys must be in host."""
        nodes = self._chain(keys)
        if any(node < 0 or not self._host.readable(node) for node in nodes):
            raise KeyError("a chunk to load is not in host memory")
        return [self._ticket("load", node, HOST) for node in nodes]

    def complete(self, operation: int, failure: str | None, now: float) -> Ticket | None:
        """An operation ended on all ranks. Returns its ticket, or None if the operation is not open."""
        opened = self._open.pop(operation, None)
        if opened is None:
            return None
        ticket, node = opened.ticket, opened.node
        self._block([node], -1)
        self._staging.discard(node)
        if ticket.kind in ("store", "stage"):
            self._complete_slot(ticket, node, failure, now)
        elif ticket.kind == "write":
            self._complete_write(opened, failure)
        elif ticket.kind == "delete":
            self._set(ticket.tier).vacate(node)
            self._forget_unused(node)
        elif failure is not None:
            self._remove([node], Miss.LOAD_FAILED)
        return ticket

    def take_tickets(self) -> list[Ticket]:
        """Writes and deletes that became due since the last call."""
        tickets, self._outbox = self._outbox, []
        return tickets

    def restore(self, tier: str, keys: Iterable[ChunkKey], now: float) -> list[ChunkKey]:
        """Believe that a tier holds keys (oldest first), as a scan found. Returns the oldest ones that are beyond its capacity."""
        residents = self._set(tier)
        listed = list(dict.fromkeys(keys))
        surplus = listed[: max(0, len(listed) - residents.num_free)]
        for key in listed[len(surplus) :]:
            node = self._nodes.get(key, -1)
            if node < 0:
                node = self._new_node(key)
            if residents.state[node] == ABSENT:
                self._enter(residents, node)
                residents.state[node] = RESIDENT
                self._access += 1
                self._insert(residents, [node], now)
        return surplus

    def clear(self) -> int:
        """Forget every chunk that no operation and no pin holds; lower tiers get deletions. Returns how many chunks remain."""
        self._remove(list(self._nodes.values()), Miss.CLEARED)
        return sum(self._somewhere(node) for node in self._nodes.values())

    # Pins

    def pin(self, keys: Iterable[ChunkKey], owner: str, expires: float) -> None:
        """Keep chunks from eviction until unpin(owner) or the expiry. An owner has one pin; a second call adds to it."""
        nodes, _ = self._pins.get(owner, ([], 0.0))
        added = [node for node in self._chain(list(keys)) if node >= 0]
        self._block(added, 1)
        self._pins[owner] = (nodes + added, expires)

    def unpin(self, owner: str) -> None:
        """Give up an owner's pin; unknown owners are fine."""
        nodes, _ = self._pins.pop(owner, ([], 0.0))
        self._block(nodes, -1)
        for node in nodes:
            self._forget_unused(node)

    def expire(self, now: float) -> None:
        """Drop pins whose time is over, and chunks whose time to live is."""
        for owner in [owner for owner, (_, expires) in self._pins.items() if expires <= now]:
            self.unpin(owner)
        if self._ttl is not None:
            old = []
            for node, touched in self._age.items():
                if now - touched <= self._ttl:
                    break
                old.append(node)
            self._remove(old, Miss.EXPIRED)

    # For metrics, tests and the live view

    @property
    def num_open(self) -> int:
        """Operations handed out and not completed."""
        return len(self._open)

    @property
    def num_pins(self) -> int:
        return len(self._pins)

    def usage(self) -> dict[str, tuple[int, int]]:
        """Tier to (chunks, capacity in chunks)."""
        return {residents.name: (residents.count, residents.capacity) for residents in self._sets}

    def check(self) -> None:
        """Assert the invariants; for tests and the end of a replay."""
        slots = [self._slot[node] for node in self._nodes.values() if self._slot[node] >= 0]
        assert len(slots) == len(set(slots)) and not set(slots) & set(self._free_slots)
        assert len(slots) + len(self._free_slots) == self._host.capacity
        for residents in self._sets:
            taken = [node for node in self._nodes.values() if residents.state[node] != ABSENT]
            assert residents.count == len(taken) <= residents.capacity
            for node in taken:
                parent = int(self._parent[node])
                if residents.state[node] == RESIDENT and parent >= 0:
                    assert self._somewhere(parent) or residents.blocked[parent] > 0
        assert all(residents.blocked.min(initial=0) >= 0 for residents in self._sets)
        if not self._open and not self._pins:
            for index, residents in enumerate(self._sets):
                children = [0] * len(self._keys)
                for above in self._sets[: index + 1]:
                    for node in self._nodes.values():
                        if above.state[node] in (INCOMING, RESIDENT) and self._parent[node] >= 0:
                            children[self._parent[node]] += 1
                assert children == residents.blocked.tolist()

    # Nodes

    def _chain(self, keys: Sequence[ChunkKey]) -> list[int]:
        return [self._nodes.get(key, -1) for key in keys]

    def _new_node(self, key: ChunkKey) -> int:
        node = self._free_nodes.pop()
        self._nodes[key] = node
        self._keys[node] = key
        self._parent[node] = -1
        self._touches[node] = 0
        return node

    def _forget_unused(self, node: int) -> None:
        """Free a node to which nothing refers any more."""
        key = self._keys[node]
        if key is not None and all(residents.unused(node) for residents in self._sets):
            del self._nodes[key]
            self._keys[node] = None
            self._age.pop(node, None)
            self._free_nodes.append(node)

    def _forget_ghosts(self) -> None:
        for residents in self._sets:
            for node in residents.forgettable():
                self._forget_unused(node)

    def _somewhere(self, node: int) -> bool:
        return any(residents.state[node] in (INCOMING, RESIDENT) for residents in self._sets)

    def _block(self, nodes: Iterable[int], by: int) -> None:
        for node in nodes:
            if node >= 0:
                for residents in self._sets:
                    residents.blocked[node] += by

    def _block_parent(self, node: int, upper: ResidentSet, by: int) -> None:
        """A chunk in a tier keeps its parent there and in the tiers below."""
        parent = int(self._parent[node])
        if parent >= 0:
            for residents in self._sets[self._sets.index(upper) :]:
                residents.blocked[parent] += by
            if by < 0:
                self._forget_unused(parent)

    def _link(self, node: int, parent: int) -> None:
        """Learn the parent of a chunk that a scan found."""
        if self._parent[node] < 0 <= parent:
            self._parent[node] = parent
            for residents in self._sets:
                if residents.state[node] in (INCOMING, RESIDENT):
                    self._block_parent(node, residents, 1)

    # Places

    def _set(self, tier: str) -> ResidentSet:
        return next(residents for residents in self._sets if residents.name == tier)

    def _below_tier(self, node: int) -> str | None:
        for residents in self._below:
            if residents.state[node] == RESIDENT:
                return residents.name
        return None

    def _enter(self, residents: ResidentSet, node: int) -> None:
        residents.reserve(node)
        self._block_parent(node, residents, 1)

    def _leave(self, residents: ResidentSet, node: int) -> None:
        """Not readable any more and not the policy's; the place is still taken."""
        residents.retire(node)
        self._block_parent(node, residents, -1)

    def _take_slot(self, node: int) -> None:
        self._enter(self._host, node)
        self._slot[node] = self._free_slots.pop()

    def _leave_host(self, node: int) -> None:
        self._leave(self._host, node)
        self._host.vacate(node)
        self._free_slots.append(self._slot[node])
        self._slot[node] = -1
        self._forget_unused(node)

    def _make_room(self) -> bool:
        """See to it that a host slot is free."""
        if self._free_slots:
            return True
        node = self._host.victim()
        if node < 0:
            return False
        if self._write == "back" and self._below and self._below_tier(node) is None:
            self.counts.writes_dropped += 1
        self._evict_from_host(node)
        return True

    def _evict_from_host(self, node: int) -> None:
        self._count_eviction(HOST, node)
        self._leave_host(node)

    def _count_eviction(self, tier: str, node: int) -> None:
        self.counts.evicted[tier] = self.counts.evicted.get(tier, 0) + 1
        key = self._keys[node]
        assert key is not None
        self._remember_miss(key, Miss.EVICTED)

    def _insert(self, residents: ResidentSet, nodes: Sequence[int], now: float) -> None:
        for node in reversed(nodes):
            residents.insert(node, self._access)
            self._stamp(node, now)

    def _touch(self, nodes: Sequence[int], now: float) -> None:
        for node in reversed(nodes):
            for residents in self._sets:
                residents.touch(node, self._access)
            self._stamp(node, now)
        if self._write != "back":
            for node in nodes:
                if self._host.readable(node):
                    self._write_below(node)

    def _stamp(self, node: int, now: float) -> None:
        self._touches[node] = min(self._touches[node] + 1, 65_535)
        if self._ttl is not None:
            self._age[node] = now
            self._age.move_to_end(node)

    def _expired(self, node: int, now: float) -> bool:
        return self._ttl is not None and now - self._age.get(node, now) > self._ttl

    def _remove(self, nodes: Sequence[int], why: Miss) -> None:
        """Take chunks out of every tier, children before parents, as far as nothing holds them."""
        remaining = set(nodes)
        while remaining:
            removable = [n for n in remaining if self._somewhere(n) and all(r.blocked[n] == 0 for r in self._sets)]
            if not removable:
                return
            for node in removable:
                remaining.discard(node)
                key = self._keys[node]
                assert key is not None
                self._remember_miss(key, why)
                for residents in self._below:
                    if residents.readable(node):
                        self._delete(residents, node)
                if self._host.readable(node):
                    self._leave_host(node)

    # Operations

    def _ticket(
        self,
        kind: Literal["store", "write", "stage", "delete", "load"],
        node: int,
        tier: str,
        evict: tuple[int, ...] = (),
        demotes: bool = False,
    ) -> Ticket:
        self._last_operation += 1
        key = self._keys[node]
        assert key is not None
        evicted = tuple(key for key in (self._keys[gone] for gone in evict) if key is not None)
        ticket = Ticket(self._last_operation, kind, key, tier, self._slot[node], evicted)
        self._open[ticket.operation] = _Open(ticket, node, evict, demotes)
        self._block([node], 1)
        return ticket

    def _complete_slot(self, ticket: Ticket, node: int, failure: str | None, now: float) -> None:
        if failure is None:
            self._host.state[node] = RESIDENT
            if self._write == "through" or (self._write == "around" and self._touches[node] >= self._write_touches):
                self._write_below(node)
            return
        self._remember_miss(ticket.key, Miss.STORE_FAILED if ticket.kind == "store" else Miss.LOAD_FAILED)
        if ticket.kind == "stage":
            residents = self._set(ticket.tier)
            if residents.readable(node):
                self._delete(residents, node)
        self._leave_host(node)

    def _write_below(self, node: int, demotes: bool = False) -> None:
        """Ask for a copy of a host chunk in the first tier below, where it or its write is missing and its parent is there."""
        if not self._below or (self._write == "around" and self._touches[node] < self._write_touches):
            return
        residents = self._below[0]
        if residents.state[node] != ABSENT or node in self._evicting:
            return
        parent = int(self._parent[node])
        if parent >= 0 and residents.state[parent] not in (INCOMING, RESIDENT):
            return  # it could not be reached; the next touch tries again
        if self._num_writes >= self._queue_depth:
            self.counts.writes_dropped += 1
            return
        evict: tuple[int, ...] = ()
        if residents.num_free == 0:
            gone = residents.victim()
            if gone < 0 or gone == parent:
                self.counts.writes_dropped += 1
                return
            self._count_eviction(residents.name, gone)
            self._leave(residents, gone)
            self._block([gone], 1)
            self._evicting.add(gone)
            evict = (gone,)
            residents.vacate(gone)
        self._enter(residents, node)
        residents.insert(node, self._access)
        self._num_writes += 1
        self._outbox.append(self._ticket("write", node, residents.name, evict, demotes))

    def _complete_write(self, opened: _Open, failure: str | None) -> None:
        self._num_writes -= 1
        node, residents = opened.node, self._set(opened.ticket.tier)
        for gone in opened.evict:
            self._block([gone], -1)
            self._evicting.discard(gone)
            self._forget_unused(gone)
        if failure is None:
            residents.state[node] = RESIDENT
        else:
            self._leave(residents, node)
            residents.vacate(node)
        if opened.demotes and failure is None and self._host.blocked[node] == 0 and self._host.readable(node):
            self._evict_from_host(node)
        self._forget_unused(node)

    def _delete(self, residents: ResidentSet, node: int) -> None:
        self._leave(residents, node)
        self._outbox.append(self._ticket("delete", node, residents.name))

    def _demote_ahead(self) -> None:
        """Write-back: keep some slots free, so that a store needn't wait for the disk."""
        missing = self._reserve - len(self._free_slots) - sum(opened.demotes for opened in self._open.values())
        for _ in range(missing):
            node = self._host.victim()
            if node < 0:
                return
            if self._below[0].state[node] == ABSENT:
                before = self._num_writes
                self._write_below(node, demotes=True)
                if self._num_writes == before:
                    return
            else:
                self._evict_from_host(node)

    # Why a chunk is absent

    def _remember_miss(self, key: ChunkKey, why: Miss) -> None:
        self._misses[key] = why
        self._misses.move_to_end(key)
        if len(self._misses) > _MISSES_REMEMBERED:
            self._misses.popitem(last=False)

    def _why(self, key: ChunkKey, node: int, now: float) -> Miss:
        if node >= 0 and self._somewhere(node):
            return Miss.EXPIRED if self._expired(node, now) else Miss.IN_FLIGHT
        return self._misses.get(key, Miss.NEVER_STORED)
