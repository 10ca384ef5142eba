"""LRU: evict the chunk that was touched longest ago. Every operation is O(1) but for blocked nodes, which the victim search skips."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmc.cache.policy.base import Blocked, Parents, PolicySpec

Links = npt.NDArray[np.int64]


class State(NamedTuple):
    older: Links  # (num_nodes + 1,) the last entry is the list's head: older[head] is the youngest node
    younger: Links  # (num_nodes + 1,) younger[head] is the oldest node


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    head = num_nodes
    links = np.full(num_nodes + 1, -1, dtype=np.int64)
    links[head] = head
    return State(older=links, younger=links.copy())


def on_hit(state: State, node: int, now: int) -> None:
    on_evict(state, node)
    on_insert(state, node, now)


def on_insert(state: State, node: int, now: int) -> None:
    head = state.older.size - 1
    youngest = state.older[head]
    state.older[node] = youngest
    state.younger[node] = head
    state.younger[youngest] = node
    state.older[head] = node


def victim(state: State, blocked: Blocked) -> int:
    head = state.older.size - 1
    node = state.younger[head]
    while node != head and blocked[node] != 0:
        node = state.younger[node]
    return -1 if node == head else int(node)


def on_evict(state: State, node: int) -> None:
    older, younger = state.older[node], state.younger[node]
    state.younger[older] = younger
    state.older[younger] = older


def release(state: State) -> int:
    return -1


SPEC = PolicySpec("lru", "least recently used", make_state, on_hit, on_insert, victim, on_evict, release)
