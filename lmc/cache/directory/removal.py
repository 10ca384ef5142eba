"""Removes expired and explicitly cleared chunks from every tier."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.directory.below import Below, Cause, Counts
from lmc.cache.directory.misses import Miss
from lmc.cache.directory.places import HOST, Places
from lmc.cache.keys import ChunkKey


class Removal:
    def __init__(self, places: Places, below: Below, counts: Counts) -> None:
        self._places = places
        self._below = below
        self._counts = counts

    def all_of(self, tenant: str | None) -> int:
        """Remove all chunks, or all known chunks of a tenant. Returns how many remain because something holds them."""
        places = self._places
        nodes = [node for node in places.nodes if tenant is None or places.tenants.owns(tenant, node)]
        keys = [places.nodes.key(node) for node in nodes]
        self._remove(nodes, Miss.CLEARED, "cleared")
        for remote in self._below.remotes:
            for key in list(remote.keys()) if tenant is None else keys:
                if key in remote:
                    self._below.delete_remote(remote, key)
        return self._num_held(keys)

    def forget_unused(self, keys: set[ChunkKey]) -> set[ChunkKey]:
        """Forget those of keys that nothing uses. Returns those that are still there."""
        find = self._places.nodes.find
        self._remove([node for node in map(find, keys) if node >= 0], Miss.CLEARED, "cleared")
        return {key for key in keys if (node := find(key)) >= 0 and self._places.present(node)}

    def from_chunk(self, key: ChunkKey) -> int:
        """Remove a chunk and all chunks that continue it. It walks all nodes. Returns how many remain."""
        places = self._places
        root = places.nodes.find(key)
        nodes = places.subtree(root) if root >= 0 else []
        affected = list(dict.fromkeys([key, *(places.nodes.key(node) for node in nodes)]))
        self._remove(nodes, Miss.CLEARED, "cleared")
        for remote in self._below.remotes:
            for one in affected:
                self._below.delete_remote(remote, one)
        return self._num_held(affected)

    def expired(self, now: float) -> None:
        old = self._places.ages.all_expired(now)
        if old:
            self._remove(old, Miss.EXPIRED, "expired")

    def _num_held(self, keys: Sequence[ChunkKey]) -> int:
        return sum(node >= 0 and self._places.present(node) for node in self._places.nodes.chain(keys))

    def _remove(self, nodes: Sequence[int], why: Miss, cause: Cause) -> None:
        """Remove nodes that nothing holds from the bounded tiers, children before parents."""
        places = self._places
        wanted = set(nodes)
        for start in nodes:
            node = start
            while node in wanted and places.present(node) and not places.in_use(node):
                wanted.discard(node)
                parent = places.parents[node]
                places.misses.note(places.nodes.key(node), why)
                for residents in places.below:
                    if residents.readable(node):
                        self._counts.gone(residents.name, cause)
                        self._below.delete(residents, node)
                if places.host.readable(node):
                    self._counts.gone(HOST, cause)
                    places.leave_host(node)
                node = parent
            if start in wanted and not places.present(start):
                places.ages.gone(start)
