"""Decides which chunks are written to the lower tiers (disk, Redis, S3), when, and which are evicted or deleted there.

A bounded tier (disk) holds a chunk only together with its parent, so the missing part of its path is written first. Remote tiers have
their own eviction, so a chunk can be written there without its parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lmc.cache.directory.holds import FULL, Operation, Operations, Ticket
from lmc.cache.directory.misses import evicted_from
from lmc.cache.directory.nodes import ABSENT, RESIDENT, ResidentSet
from lmc.cache.directory.places import HOST, Places
from lmc.cache.directory.remote import RemoteKeys
from lmc.cache.keys import ChunkKey
from lmc.cache.parts import SPINE

_WRITES_SHARE = 8  # writes under way keep host slots from eviction; those of one tier at most this part of them
_FEW_WRITES = 16  # that a small host may have under way all the same
_RELIEF = 64  # so large a part of a tier goes when its medium is full
WriteMode = Literal["through", "back", "around"]
Cause = Literal["room", "quota", "demoted", "expired", "cleared", "failed"]


@dataclass
class Counts:
    """Totals since the start."""

    stores_dropped: int = 0  # chunks for which no slot was free
    writes_dropped: int = 0  # chunks not written below: queue full, or no room
    evicted: dict[str, int] = field(default_factory=dict)  # by tier, to make room
    removed: dict[tuple[str, Cause], int] = field(default_factory=dict)  # by tier and cause, evictions included

    def gone(self, tier: str, cause: Cause) -> None:
        self.removed[tier, cause] = self.removed.get((tier, cause), 0) + 1
        if cause in ("room", "quota", "demoted"):
            self.evicted[tier] = self.evicted.get(tier, 0) + 1


class Below:
    def __init__(
        self,
        places: Places,
        operations: Operations,
        remotes: Sequence[RemoteKeys],
        counts: Counts,
        *,
        write: WriteMode,
        write_touches: int,
        queue_depth: int,
    ) -> None:
        self.outbox: list[Ticket] = []
        self.remotes = list(remotes)
        bounded = {residents.name for residents in places.below}
        self._foreign = {remote.name: remote for remote in remotes if remote.name in bounded}
        self._unbounded = [remote for remote in remotes if remote.name not in bounded]
        self._places = places
        self._operations = operations
        self._counts = counts
        self._write = write
        self._write_touches = write_touches
        share = max(_FEW_WRITES, places.host.capacity // _WRITES_SHARE)
        self._queue_depth = (
            queue_depth if write == "back" else min(queue_depth, share)
        )  # back: writes are what frees slots
        self.exists = bool(places.below or self._unbounded)
        self._keeps_reserve = write == "back" and self.exists
        self._writing: dict[str, int] = {}  # bounded tier -> writes under way
        self._evicting: set[int] = set()  # nodes that an open write deletes from its tier first
        self._relieving: set[int] = set()  # deletions that make room in a medium that is fuller than its capacity says
        self._demoting: dict[int, int] = {}  # node -> open writes after which its host copy is evicted

    @property
    def num_writing(self) -> dict[str, int]:
        """Writes under way, by tier."""
        return {**self._writing, **{remote.name: remote.num_writing for remote in self._unbounded}}

    # When

    def after_store(self, node: int) -> None:
        if self._write == "through" or (self._write == "around" and self._touched_enough(node)):
            self.write(node)

    def after_touch(self, nodes: Sequence[int]) -> None:
        """Write touched chunks that lower tiers still lack, because their write was dropped, or was not yet due."""
        if self._write == "back" or not self.exists:
            return
        host = self._places.host.state
        for node in nodes:
            if host[node] == RESIDENT and (self._write == "through" or self._touched_enough(node)):
                self.write(node)

    def make_room(self) -> bool:
        """Make sure that a host slot is free."""
        places = self._places
        while not places.num_free_slots:  # once, unless the slot that comes free was recalled
            node = places.host.victim()
            if node < 0:
                return False
            if self._write == "back" and self.exists and not self.has_copy(node):
                self._counts.writes_dropped += 1
            self.evict_from_host(node, "room")
        return True

    def demote_ahead(self) -> None:
        """In write mode back, keep some slots free, so that a store does not wait for a lower tier."""
        if not self._keeps_reserve:
            return
        places = self._places
        missing = max(1, places.num_slots // 8) - places.num_free_slots - len(self._demoting)
        for _ in range(missing):
            node = places.host.victim()
            if node < 0:
                return
            if self.has_copy(node):
                self.evict_from_host(node, "demoted")
            elif not self.write(node, demotes=True):
                return

    # What

    def has_copy(self, node: int) -> bool:
        """Whether a tier below the host has the chunk."""
        key = self._places.nodes.key(node)
        return self._places.tier_below(node) is not None or any(key in remote for remote in self.remotes)

    def evict_from_host(self, node: int, cause: Cause) -> None:
        self._count(HOST, node, cause)
        self._places.leave_host(node)

    def write(self, node: int, *, demotes: bool = False) -> bool:
        """Queue writes of a host chunk to the lower tiers that lack it. False if no write was queued."""
        asked = False
        for residents in self._places.below:
            if residents.state[node] == ABSENT and self._write_path(residents, node, demotes):
                asked = True
        key = self._places.nodes.key(node)
        for remote in self._unbounded:
            if remote.may_write(key) and self._write_remote(remote, node, key, demotes):
                asked = True
        return asked

    def delete(self, residents: ResidentSet, node: int) -> int:
        """Returns the operation."""
        places = self._places
        places.leave(residents, node)
        return self._issue("delete", node, places.nodes.key(node), residents.name)

    def delete_remote(self, remote: RemoteKeys, key: ChunkKey) -> None:
        """Delete chunks that other instances may have stored. This instance's own chunks in a shared tier are deleted by delete()."""
        node = self._places.nodes.find(key)
        own = self._places.set_of(remote.name)
        if (own is None or node < 0 or own.state[node] == ABSENT) and remote.begin_delete(key):
            self._issue("delete", -1, key, remote.name)

    def complete_delete(self, done: Operation) -> None:
        if done.node < 0:
            next(remote for remote in self.remotes if remote.name == done.ticket.tier).end_delete(done.ticket.key)
            return
        residents = self._places.set_of(done.ticket.tier)
        assert residents is not None
        residents.vacate(done.node)
        self._relieving.discard(done.ticket.operation)
        self._places.forget_unused(done.node)

    def complete_write(self, done: Operation, failure: str | None, saved: int) -> None:
        places, node, stored = self._places, done.node, failure is None
        residents = places.set_of(done.ticket.tier)
        if residents is None:
            next(remote for remote in self._unbounded if remote.name == done.ticket.tier).end_write(
                done.ticket.key, stored=stored
            )
        else:
            self._writing[residents.name] -= 1
            for gone in done.evict:
                places.hold_one(gone, -1)
                self._evicting.discard(gone)
                places.forget_unused(gone)
            if stored:
                residents.shrink(node, saved)
                places.arrive(residents, node)
            else:
                places.leave(residents, node)
                residents.vacate(node)
                if failure == FULL:
                    self._relieve(residents)
        if done.demotes:
            self._demoting[node] -= 1
            if self._demoting[node] == 0:
                del self._demoting[node]
                if places.host.readable(node) and not places.host.holds[node] and self.has_copy(node):
                    self.evict_from_host(node, "demoted")
        places.forget_unused(node)

    def _relieve(self, residents: ResidentSet) -> None:
        """The medium was full before the capacity was reached: others fill it, too. Some chunks go, so that the next writes find room.

        Once for all the writes that were under way together.
        """
        if self._relieving:
            return
        for _ in range(max(1, residents.count // _RELIEF)):
            victim = residents.victim()
            if victim < 0:
                return
            self._count(residents.name, victim, "room")
            self._relieving.add(self.delete(residents, victim))

    def _touched_enough(self, node: int) -> bool:
        return self._places.touches[node] >= self._write_touches

    def _write_path(self, residents: ResidentSet, node: int, demotes: bool) -> bool:
        """Queue writes of the chunk and of its ancestors that the tier lacks. False if an ancestor is gone or the queue is full."""
        places = self._places
        path: list[int] = []
        step = node
        while step >= 0 and not residents.present(step):
            key = places.nodes.key(step)
            foreign = self._foreign.get(residents.name)
            if foreign is not None and key in foreign:
                break
            if not places.host.readable(step) or residents.state[step] != ABSENT or step in self._evicting:
                return False
            if foreign is not None and foreign.deleting(key):
                return False
            path.append(step)
            step = places.parents[step]
        return bool(path) and all(self._write_bounded(residents, s, demotes and s == node) for s in reversed(path))

    def _write_bounded(self, residents: ResidentSet, node: int, demotes: bool) -> bool:
        places = self._places
        if self._writing.get(residents.name, 0) >= self._queue_depth:
            self._counts.writes_dropped += 1
            return False
        gone = self._make_way(residents)
        if gone is None:
            self._counts.writes_dropped += 1
            return False
        keys = tuple(places.nodes.key(victim) for victim in gone)
        places.enter(residents, node)
        residents.insert(node, places.access)
        self._writing[residents.name] = self._writing.get(residents.name, 0) + 1
        self._issue("write", node, places.nodes.key(node), residents.name, gone, keys, demotes)
        return True

    def _make_way(self, residents: ResidentSet) -> tuple[int, ...] | None:
        """Evict what must go before one more chunk, whatever its size will be, fits; None when not enough of it can go."""
        places = self._places
        gone: list[int] = []
        while not residents.fits(residents.chunk_bytes, gone):
            victim = residents.victim()
            if victim < 0:
                for node in gone:  # the place that they leave is for the next write
                    self._issue("delete", node, places.nodes.key(node), residents.name)
                    self._evicting.discard(node)
                places.hold(gone, -1)
                return None
            gone.append(victim)
            self._count(residents.name, victim, "room")
            places.hold_one(victim, 1)
            self._evicting.add(victim)
            places.leave(residents, victim)
        for victim in gone:
            residents.vacate(victim)
        return tuple(gone)

    def _write_remote(self, remote: RemoteKeys, node: int, key: ChunkKey, demotes: bool) -> bool:
        if remote.num_writing >= self._queue_depth:
            self._counts.writes_dropped += 1
            return False
        remote.begin_write(key)
        self._issue("write", node, key, remote.name, demotes=demotes)
        return True

    def _issue(
        self,
        kind: Literal["write", "delete"],
        node: int,
        key: ChunkKey,
        tier: str,
        gone: tuple[int, ...] = (),
        gone_keys: tuple[ChunkKey, ...] = (),
        demotes: bool = False,
    ) -> int:
        slot, parent = -1, None
        if kind == "write":
            slot, parent = self._places.slots[node], self._places.parent_key(node)
        ticket = self._operations.open(
            kind,
            key,
            node,
            tier,
            slot,
            self._places.groups[node] if node >= 0 else SPINE,
            evict=gone_keys,
            parent=parent,
            evict_nodes=gone,
            demotes=demotes,
        )
        self.outbox.append(ticket)
        self._places.hold_one(node, 1)
        if demotes:
            self._demoting[node] = self._demoting.get(node, 0) + 1
        return ticket.operation

    def _count(self, tier: str, node: int, cause: Cause) -> None:
        self._counts.gone(tier, cause)
        self._places.misses.note(self._places.nodes.key(node), evicted_from(tier))
