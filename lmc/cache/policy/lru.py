"""LRU evicts the chunk that was touched longest ago.

Operations cost O(1), except that the search steps over held nodes at the old end. Moving these away would be cheaper but wrong: in a tier
that chunks enter from the first to the last, such as disk, the head of the oldest chain stands there, held by its children.
"""

from __future__ import annotations

from typing import NamedTuple

from lmc.cache.policy.base import Holds, Parents, PolicySpec
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


def victim(state: State, holds: Holds) -> int:
    recency = state.recency
    head = recency.older.size - 1
    node = recency.younger[head]
    while node != head and holds[node] != 0:
        node = recency.younger[node]
    return -1 if node == head else node


def on_evict(state: State, node: int) -> None:
    unlink(state.recency, node)


def release(state: State) -> int:
    return -1


SPEC = PolicySpec("lru", "least recently used", make_state, on_hit, on_insert, victim, on_evict, release)
