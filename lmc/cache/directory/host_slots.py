"""Bookkeeping for host-slot copies: reserve a slot, and update the state when the copy completes or fails."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.directory.below import Below, Counts
from lmc.cache.directory.holds import CORRUPT, FORGED, LATE, UNAVAILABLE, Kind, Operation, Operations, Ticket
from lmc.cache.directory.misses import Miss
from lmc.cache.directory.nodes import ABSENT, SPOILED
from lmc.cache.directory.places import HOST, Places
from lmc.cache.directory.remote import RemoteKeys
from lmc.cache.keys import ChunkKey

_NOT_OURS = (CORRUPT, FORGED)  # the causes for which a chunk of others is deleted
_CHUNK_IS_FINE = (LATE, UNAVAILABLE)  # causes that say nothing about the chunk


class HostSlots:
    def __init__(
        self, places: Places, below: Below, operations: Operations, remotes: Sequence[RemoteKeys], counts: Counts
    ) -> None:
        self.staging: set[int] = set()  # nodes on their way from a tier below
        self.spoiled: set[int] = set()  # nodes whose load failed and whose slot other transfers still use
        self._places = places
        self._below = below
        self._operations = operations
        self._remotes = remotes
        self._counts = counts

    def make_room(self, tenant: str) -> bool:
        """Make sure that a slot is free, and that the tenant may take it."""
        places = self._places
        if places.tenants.at_quota(tenant):
            node = places.tenants.oldest(tenant, places.host.holds)
            if node < 0:
                return False
            self._below.evict_from_host(node, "quota")
        return self._below.make_room()

    def store(
        self, key: ChunkKey, chain: list[int], index: int, parent: int, tenant: str, now: float, group: int = 0
    ) -> Ticket | None:
        """Reserve a host slot for chain[index]. Writes a newly created node into chain[index]. Returns None if no slot is available."""
        places, node = self._places, chain[index]
        if node >= 0 and places.host.state[node] != ABSENT:
            return None  # a failed load still has transfers under way
        if not self.make_room(tenant) or (node < 0 and places.nodes.full):
            return None
        if node < 0:
            node = chain[index] = places.add(key, parent, now)
            places.hold_one(node, 1)
        elif places.present(node):
            places.adopt(node, parent, tenant)
        else:
            places.parents[node] = parent
            places.ages.born(node, now)
        places.groups[node] = group
        places.count_touch(node)
        places.tenants.assign(node, tenant)
        places.take_slot(node)
        return self._issue("store", node, HOST, group)

    def stage(
        self,
        key: ChunkKey,
        chain: list[int],
        index: int,
        parent: int,
        tenant: str,
        now: float,
        tier: str,
        group: int = 0,
    ) -> Ticket | None:
        """The same for a chunk of a lower tier, which is not in host."""
        places, node = self._places, chain[index]
        if (node >= 0 and places.host.state[node] != ABSENT) or not self.make_room(tenant):
            return None
        if node < 0:
            if places.nodes.full:
                return None
            node = chain[index] = places.add(key, parent, now)
            places.hold_one(node, 1)
        if not places.present(node):
            places.parents[node] = parent
        if places.ages.expired(node, now):  # that copy is still being deleted; the one that arrives is not expired
            places.ages.born(node, now)
        places.adopt(node, parent, tenant)
        places.groups[node] = group
        places.take_slot(node)
        self.staging.add(node)
        return self._issue("stage", node, tier, group)

    def load(self, node: int) -> Ticket:
        return self._issue("load", node, HOST, self._places.groups[node])

    def complete(self, done: Operation, failure: str | None) -> None:
        """Update the state after a store, a stage or a load ended."""
        ticket, node, places = done.ticket, done.node, self._places
        if done.stranded_slot >= 0:
            places.free_stranded(done.stranded_slot)
            return
        self.staging.discard(node)
        if ticket.kind == "load":
            if failure is not None and places.host.readable(node):
                places.host.state[node] = SPOILED
                places.misses.note(ticket.key, Miss.LOAD_FAILED)
                self.spoiled.add(node)
        elif failure is None:
            if ticket.kind == "stage":
                self._confirm_source(ticket)
            places.arrive(places.host, node)
            places.unreached.discard(node)
            if self._below.exists:
                self._below.after_store(node)
        else:
            places.misses.note(ticket.key, Miss.STORE_FAILED if ticket.kind == "store" else Miss.LOAD_FAILED)
            if ticket.kind == "stage":
                self._doubt_source(ticket, node, failure)
            places.leave_host(node)

    def strand(self, stage: Operation) -> None:
        """A stage hangs in its tier: the chunk counts as absent there, and its slot is free when the copy ends, however late."""
        places, node = self._places, stage.node
        self.staging.discard(node)
        places.misses.note(stage.ticket.key, Miss.LOAD_FAILED)
        self._doubt_source(stage.ticket, node, "stuck")
        stage.node, stage.stranded_slot = -1, places.strand_slot(node)
        places.hold_one(node, -1)
        places.forget_unused(node)

    def free_spoiled(self) -> None:
        """Free the slots of failed loads that no transfer uses any more."""
        busy = {operation.node for operation in self._operations}
        for node in [node for node in self.spoiled if node not in busy]:
            self.spoiled.remove(node)
            self._counts.gone(HOST, "failed")
            self._places.leave_host(node)

    def _confirm_source(self, ticket: Ticket) -> None:
        """A stage succeeded, so the chunk is there now."""
        for remote in self._remotes:
            if remote.name == ticket.tier and ticket.key in remote:
                remote.learn(ticket.key)

    def _doubt_source(self, ticket: Ticket, node: int, failure: str) -> None:
        """After a failed stage, delete or forget the chunk in its tier, unless the failure says nothing about the chunk."""
        residents = self._places.set_of(ticket.tier)
        if residents is not None and residents.readable(node):
            if failure not in _CHUNK_IS_FINE:
                self._below.delete(residents, node)
            else:
                self._places.unreached.add(node)
            return
        for remote in self._remotes:
            if remote.name == ticket.tier:
                remote.forget(ticket.key)
                if failure in _NOT_OURS:
                    self._below.delete_remote(remote, ticket.key)

    def _issue(self, kind: Kind, node: int, tier: str, group: int) -> Ticket:
        places = self._places
        ticket = self._operations.open(kind, places.nodes.key(node), node, tier, places.slots[node], group)
        places.hold_one(node, 1)
        return ticket
