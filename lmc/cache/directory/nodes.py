"""Chunk keys as small integers, which index the arrays of the other modules."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from lmc.cache.keys import ChunkKey


class Nodes:
    """A hash table with chaining in flat arrays: about 100 bytes a node with its key, half of what a dict of bytes to int takes."""

    def __init__(self, num_nodes: int) -> None:
        self.keys: list[ChunkKey | None] = [None] * num_nodes
        self._mask = (1 << num_nodes.bit_length()) - 1
        self._heads = array("i", [-1]) * (self._mask + 1)
        self._next = array("i", [-1]) * num_nodes  # the next node of the bucket, or of the free list
        self._free = -1
        self._fresh = 0  # nodes from here on were never taken
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return (node for node in range(self._fresh) if self.keys[node] is not None)

    @property
    def full(self) -> bool:
        return self._count == len(self.keys)

    def key(self, node: int) -> ChunkKey:
        key = self.keys[node]
        assert key is not None
        return key

    def find(self, key: ChunkKey) -> int:
        """The node of a key, or -1."""
        node = self._heads[hash(key) & self._mask]
        while node >= 0 and self.keys[node] != key:
            node = self._next[node]
        return node

    def chain(self, keys: Sequence[ChunkKey]) -> list[int]:
        return [self.find(key) for key in keys]

    def add(self, key: ChunkKey) -> int:
        """A node for a new key; there must be a free one."""
        node = self._free
        if node >= 0:
            self._free = self._next[node]
        else:
            node = self._fresh
            self._fresh += 1
        bucket = hash(key) & self._mask
        self._next[node] = self._heads[bucket]
        self._heads[bucket] = node
        self.keys[node] = key
        self._count += 1
        return node

    def remove(self, node: int) -> None:
        bucket = hash(self.key(node)) & self._mask
        if self._heads[bucket] == node:
            self._heads[bucket] = self._next[node]
        else:
            before = self._heads[bucket]
            while self._next[before] != node:
                before = self._next[before]
            self._next[before] = self._next[node]
        self.keys[node] = None
        self._next[node] = self._free
        self._free = node
        self._count -= 1
