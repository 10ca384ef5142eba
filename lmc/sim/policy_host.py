"""A host for eviction policies that shares nothing with the replay's kernel, for checking what a policy must do.

The host names blocks by their whole prefix, hands out node numbers again as soon as a policy lets them go, and checks each answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from lmc.cache.policy.base import PolicySpec


class BrokenContractError(Exception):
    """A policy did what lmc.cache.policy.base forbids."""


Key = tuple[int, ...]  # a block, as the labels of its chain from the start
Request = Sequence[int]  # the labels of one request's chain
IsBlocked = Callable[[Key], bool]


class Policy(Protocol):
    """A policy that speaks of keys: one of lmc's behind NodePolicy, or a naive one."""

    def begin(self, request_class: int) -> None: ...
    def hit(self, key: Key, now: int) -> None: ...
    def insert(self, key: Key, now: int) -> None: ...
    def victim(self, held: IsBlocked) -> Key | None: ...
    def evict(self, key: Key) -> None: ...
    def settle(self, chain: Sequence[Key]) -> None: ...  # the request is over


class NodePolicy:
    """A PolicySpec behind keys, with as few node numbers as the contract allows."""

    def __init__(self, spec: PolicySpec, capacity: int, most_new: int) -> None:
        self.spec = spec
        # Resident and remembered nodes, and those of one request that are evicted before its own are inserted.
        num_nodes = int(capacity * (1 + spec.ghosts)) + 1 + most_new
        self.parents = np.full(num_nodes, -1, dtype=np.int32)
        self.state = spec.make_state(num_nodes, capacity, self.parents)
        self.free = list(range(num_nodes))
        self.node_of: dict[Key, int] = {}
        self.key_of: dict[int, Key] = {}
        self.resident: set[Key] = set()

    def node(self, key: Key) -> int:
        if key not in self.node_of:
            _require(
                bool(self.free),
                f"{self.spec.name} remembers more nodes than its `ghosts` of {self.spec.ghosts:g} allow",
            )
            self.node_of[key] = self.free.pop()
            self.key_of[self.node_of[key]] = key
        return self.node_of[key]

    def forget(self, node: int) -> None:
        del self.node_of[self.key_of.pop(node)]
        self.free.append(node)

    def begin(self, request_class: int) -> None:
        if self.spec.on_request is not None:
            self.spec.on_request(self.state, request_class)

    def hit(self, key: Key, now: int) -> None:
        _require(key in self.resident, "the host touched a node that is not there")
        self.spec.on_hit(self.state, self.node_of[key], now)

    def insert(self, key: Key, now: int) -> None:
        _require(key not in self.resident, "the host inserted a node twice")
        for depth in range(1, len(key) + 1):
            node = self.node(key[:depth])
            self.parents[node] = self.node_of[key[: depth - 1]] if depth > 1 else -1
        self.resident.add(key)
        self.spec.on_insert(self.state, self.node_of[key], now)

    def settle(self, chain: Sequence[Key]) -> None:
        """Forget what the policy releases; the chain of the running request keeps its numbers."""
        while (node := self.spec.release(self.state)) >= 0:
            _require(node in self.key_of, f"{self.spec.name} released a node that nobody knows")
            key = self.key_of[node]
            _require(key not in self.resident, f"{self.spec.name} released a resident node")
            if key not in chain:
                self.forget(node)

    def victim(self, held: IsBlocked) -> Key | None:
        marks = np.zeros(self.parents.size, dtype=np.int32)
        for key in self.resident:
            marks[self.node_of[key]] = held(key)
        node = self.spec.victim(self.state, marks)
        _require(
            node == self.spec.victim(self.state, marks), f"{self.spec.name} changed its mind when it was asked twice"
        )
        if node < 0:
            _require(all(held(key) for key in self.resident), f"{self.spec.name} found no victim, but there is one")
            return None
        key = self.key_of.get(node, ())
        _require(key in self.resident, f"{self.spec.name} chose a node that is not there")
        _require(not held(key), f"{self.spec.name} chose a held node")
        return key

    def evict(self, key: Key) -> None:
        self.resident.remove(key)
        self.spec.on_evict(self.state, self.node_of[key])
        if self.spec.ghosts == 0:
            self.forget(self.node_of[key])


def class_of(labels: Request) -> int:
    """A class for a request, often 0, that other requests have too."""
    return len(labels) % 4


class Host:
    """A cache of `capacity` blocks that follows the order of calls in lmc.cache.policy.base."""

    def __init__(self, policy: Policy, capacity: int, classed: bool = False) -> None:
        self.policy = policy
        self.classed = classed  # requests have the class that class_of() gives them, not 0
        self.capacity = capacity
        self.there: set[Key] = set()
        self.children: Counter[Key] = Counter()
        self.pins: Counter[Key] = Counter()
        self.victims: list[Key] = []
        self.hits: list[int] = []

    def held(self, key: Key) -> bool:
        return self.children[key] > 0 or self.pins[key] > 0

    def drop(self, key: Key) -> None:
        self.there.remove(key)
        self.children[key[:-1]] -= 1
        self.policy.evict(key)

    def request(self, labels: Request) -> None:
        now = len(self.hits) + 1
        chain = [tuple(labels[: depth + 1]) for depth in range(min(len(labels), self.capacity))]
        found = 0
        while found < len(chain) and chain[found] in self.there:
            found += 1
        self.hits.append(found)
        self.pins.update(chain)
        self.policy.begin(class_of(labels) if self.classed else 0)
        while len(self.there) + len(chain) - found > self.capacity:
            key = self.policy.victim(self.held)
            if key is None:
                break
            self.victims.append(key)
            self.drop(key)
        room = self.capacity - len(self.there)
        chain = chain[: found + room]  # pins may have left too little room
        for depth in range(len(chain) - 1, -1, -1):
            if depth < found:
                self.policy.hit(chain[depth], now)
            else:
                self.there.add(chain[depth])
                self.children[chain[depth][:-1]] += 1
                self.policy.insert(chain[depth], now)
        self.policy.settle(chain)
        self.pins.subtract(tuple(labels[: depth + 1]) for depth in range(min(len(labels), self.capacity)))
        _require(all(len(key) == 1 or key[:-1] in self.there for key in self.there), "the resident set has a hole")
        _require(len(self.there) <= self.capacity, "the cache holds more than its capacity")


def run_spec(spec: PolicySpec, requests: Sequence[Request], capacity: int, classed: bool = False) -> Host:
    most_new = max(len(labels) for labels in requests)
    return run_policy(NodePolicy(spec, capacity, most_new), requests, capacity, classed)


def run_policy(policy: Policy, requests: Sequence[Request], capacity: int, classed: bool = False) -> Host:
    host = Host(policy, capacity, classed)
    for labels in requests:
        host.request(labels)
    return host


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BrokenContractError(otherwise)
