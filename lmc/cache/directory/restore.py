"""Rebuilds a tier's index at start: parents, the order of age, and which chunks exceed the capacity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lmc.cache.directory.nodes import ABSENT, ResidentSet
from lmc.cache.directory.places import Places
from lmc.cache.keys import ChunkKey


def restore(
    places: Places,
    residents: ResidentSet,
    keys: Iterable[ChunkKey],
    parents: Mapping[ChunkKey, ChunkKey],
    sizes: Mapping[ChunkKey, int],
    now: float,
) -> list[ChunkKey]:
    """Carry out Directory.restore() for one tier."""
    listed = youngest_first(keys, parents)
    free = residents.num_bytes - residents.bytes_taken
    kept: list[ChunkKey] = []
    for key in listed[: residents.capacity - residents.count]:
        free -= sizes.get(key, residents.chunk_bytes)
        if free < 0:
            break
        kept.append(key)
    nodes: dict[int, None] = {}
    for key in kept:
        node = places.nodes.find(key)
        if node < 0:
            node = places.add(key, -1, now)
        if not places.present(node):
            parent = places.nodes.find(parents[key]) if key in parents else -1
            places.parents[node] = parent if parent in nodes or (parent >= 0 and places.present(parent)) else -1
        nodes[node] = None
    for node in reversed(nodes):
        if residents.state[node] == ABSENT:
            places.enter(residents, node, sizes.get(places.nodes.key(node)))
            places.arrive(residents, node)
            places.begin_access(0)
            places.insert(residents, [node])
    return list(reversed(listed[len(kept) :]))


def youngest_first(oldest_first: Iterable[ChunkKey], parents: Mapping[ChunkKey, ChunkKey]) -> list[ChunkKey]:
    """Keys from young to old, each once and behind its parent. A chunk counts as young as the youngest one that continues it."""
    keys = dict.fromkeys(oldest_first)
    placed: set[ChunkKey] = set()
    order: list[ChunkKey] = []
    for key in reversed(keys):
        path = []
        step: ChunkKey | None = key
        while step is not None and step in keys and step not in placed:
            placed.add(step)
            path.append(step)
            step = parents.get(step)
        order += reversed(path)
    return order
