"""Chunks as small integers, which index flat arrays: the table from key to node, and the set of nodes that one tier holds."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lmc.cache.keys import ChunkKey
from lmc.cache.policy.base import Holds, Parents, PolicySpec

ABSENT, INCOMING, RESIDENT, LEAVING, SPOILED = range(5)


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
        """find() of each."""
        nodes = self.leading(keys)
        nodes += [self.find(key) for key in keys[len(nodes) :]]
        return nodes

    def leading(self, keys: Sequence[ChunkKey]) -> list[int]:
        """The nodes of keys up to the first that has none, in one loop: every lookup and every pin comes here with a whole prompt."""
        heads, mask, following, held = self._heads, self._mask, self._next, self.keys
        nodes: list[int] = []
        for key in keys:
            node = heads[hash(key) & mask]
            while node >= 0 and held[node] != key:
                node = following[node]
            if node < 0:
                break
            nodes.append(node)
        return nodes

    def add(self, key: ChunkKey) -> int:
        """Assign a node to a new key. A free node must exist."""
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


@dataclass(frozen=True)
class Capacity:
    """What fits into a tier: num_bytes, of which a chunk that was not compressed takes chunk_bytes, and never more than so many chunks."""

    num_bytes: int
    chunk_bytes: int
    chunks: int

    @classmethod
    def of_chunks(cls, chunks: int) -> Capacity:
        """Of a tier whose chunks are all of one size."""
        return cls(chunks, 1, chunks)


class ResidentSet:
    """Nodes in [0, num_nodes) and their state in one tier.

    INCOMING   holds its place but is not readable yet
    LEAVING    is gone for the policy but holds its place until vacate()
    SPOILED    failed to load; holds its place until its last transfer ends

    Each hold on a node (by a pin, a transfer or a child) is removed by the code that added it.
    """

    def __init__(self, name: str, capacity: Capacity, num_nodes: int, spec: PolicySpec, parents: Parents) -> None:
        self.name = name
        self.capacity = capacity.chunks
        self.num_bytes = capacity.num_bytes
        self.chunk_bytes = capacity.chunk_bytes
        self.sizes = array("q", bytes(8 * num_nodes))  # bytes that each node's place takes
        self.bytes_taken = 0
        self.state = bytearray(num_nodes)
        self.holds = array("i", bytes(4 * num_nodes))  # scalar access is twice as quick as NumPy's
        self.count = 0  # places taken, in every state but ABSENT
        self._holds_view: Holds = np.frombuffer(self.holds, dtype=np.int32)  # the policy's view of it
        self._spec = spec
        self._policy = spec.make_state(num_nodes, capacity.chunks, parents)
        self._ghost = bytearray(num_nodes)

    def fits(self, size: int, leaving: Sequence[int] = ()) -> bool:
        """Whether a chunk of that size finds a place once these nodes are gone."""
        freed = sum(self.sizes[node] for node in leaving)
        return self.count - len(leaving) < self.capacity and self.bytes_taken - freed + size <= self.num_bytes

    def readable(self, node: int) -> bool:
        return self.state[node] == RESIDENT

    def present(self, node: int) -> bool:
        """Whether the node is readable, or about to be."""
        return self.state[node] in (INCOMING, RESIDENT)

    def reserve(self, node: int, size: int) -> None:
        """Reserve a place for an absent node. It must fit."""
        assert self.state[node] == ABSENT and self.count < self.capacity and self.bytes_taken + size <= self.num_bytes
        self.state[node] = INCOMING
        self.count += 1
        self.sizes[node] = size
        self.bytes_taken += size

    def shrink(self, node: int, saved: int) -> None:
        """The node's chunk takes so many bytes less than were reserved."""
        self.sizes[node] -= saved
        self.bytes_taken -= saved

    def begin_access(self, request_class: int) -> None:
        """Tell the policy of the request whose chunks are touched and inserted next."""
        if self._spec.on_request is not None:
            self._spec.on_request(self._policy, request_class)

    def insert(self, node: int, now: int) -> None:
        """Tell the policy of a reserved node. The order of these calls is the policy's order."""
        self._ghost[node] = 0
        self._spec.on_insert(self._policy, node, now)

    def touch(self, node: int, now: int) -> None:
        if self.present(node):
            self._spec.on_hit(self._policy, node, now)

    def victim(self) -> int:
        """The node to evict next, or -1. Nodes that are not RESIDENT must be held by their transfer."""
        return int(self._spec.victim(self._policy, self._holds_view))

    def retire(self, node: int) -> None:
        """Remove the node from the policy. It keeps its place until vacate()."""
        self._spec.on_evict(self._policy, node)
        self._ghost[node] = self._spec.ghosts > 0
        self.state[node] = LEAVING

    def vacate(self, node: int) -> None:
        """Free the place of a retired node."""
        assert self.state[node] == LEAVING
        self.state[node] = ABSENT
        self.count -= 1
        self.bytes_taken -= self.sizes[node]
        self.sizes[node] = 0

    def forgettable(self) -> list[int]:
        """Take the ghosts (remembered nodes that were evicted) that the policy no longer needs."""
        nodes = []
        while (node := int(self._spec.release(self._policy))) >= 0:
            self._ghost[node] = 0
            nodes.append(node)
        return nodes

    def unused(self, node: int) -> bool:
        """Whether nothing here refers to the node any more."""
        return self.state[node] == ABSENT and not self._ghost[node] and self.holds[node] == 0
