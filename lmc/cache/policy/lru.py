"""LRU: evict the chunk that was touched longest ago. A blocked node at the old end is in use, which counts as a touch: amortised O(1)."""

from __future__ import annotations

from typing import NamedTuple

from lmc.cache.policy.base import Blocked, Parents, PolicySpec
from lmc.cache.policy.lists import Lists, make_lists, put_before, unlink


class State(NamedTuple):
    recency: Lists


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    return State(make_lists(num_nodes, 1))


def on_hit(state: State, node: int, now: int) -> None:
    unlink(state.recency, node)
    put_before(state.recency, state.recency.older.size - 1, node)


def on_insert(state: State, node: int, now: int) -> None:
    put_before(state.recency, state.recency.older.size - 1, node)


def victim(state: State, blocked: Blocked) -> int:
    recency = state.recency
    head = recency.older.size - 1
    node = recency.younger[head]
    first_blocked = -1
    while node != head and blocked[node] != 0:
        if node == first_blocked:
            return -1
        if first_blocked < 0:
            first_blocked = node
        unlink(recency, node)
        put_before(recency, head, node)
        node = recency.younger[head]
    return -1 if node == head else node


def on_evict(state: State, node: int) -> None:
    unlink(state.recency, node)


def release(state: State) -> int:
    return -1


SPEC = PolicySpec("lru", "least recently used", make_state, on_hit, on_insert, victim, on_evict, release)
