"""SIEVE (Zhang et al., NSDI 2024) has a queue in order of storing, a hand that walks from old to young, and one bit for each chunk.

The hand clears the bit of a chunk that was hit since it last passed, and stops at the first one without. A parent that returns from aside
stands where the hand will look next. Every operation is amortised O(1).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmc.cache.policy.base import Holds, Parents, PolicySpec
from lmc.cache.policy.lists import (
    Chains,
    Lists,
    Marks,
    add_child,
    drop_child,
    make_chains,
    make_lists,
    put_before,
    set_aside,
    take_out,
)


class State(NamedTuple):
    queue: Lists
    chains: Chains
    visited: Marks  # (num_nodes,)
    hand: npt.NDArray[np.int32]  # (1,) the node to look at next; the head stands for the old end


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    visited = np.zeros(num_nodes, dtype=np.uint8)
    hand = np.full(1, num_nodes, dtype=np.int32)
    return State(make_lists(num_nodes, 1), make_chains(num_nodes, parents), visited, hand)


def on_hit(state: State, node: int, now: int) -> None:
    state.visited[node] = 1


def on_insert(state: State, node: int, now: int) -> None:
    state.visited[node] = 0
    put_before(state.queue, state.queue.older.size - 1, node)
    add_child(state.chains, node)


def victim(state: State, holds: Holds) -> int:
    queue = state.queue
    head = queue.older.size - 1
    node = state.hand[0]
    ends = 0
    while True:
        if node == head:
            ends += 1
            node = queue.younger[head]
            # The first whole round clears all bits; a second one without a victim means that all are held.
            if ends > 2 or node == head:
                state.hand[0] = head
                return -1
        if state.visited[node]:
            state.visited[node] = 0
        elif holds[node] == 0:
            state.hand[0] = node
            return int(node)
        following = queue.younger[node]
        if holds[node] != 0 and state.chains.children[node] > 0:
            set_aside(queue, state.chains, node)
        node = following


def on_evict(state: State, node: int) -> None:
    if state.hand[0] == node:
        state.hand[0] = state.queue.younger[node]
    take_out(state.queue, state.chains, node)
    parent = drop_child(state.chains, node)
    if parent >= 0:
        put_before(state.queue, state.hand[0], parent)
        state.hand[0] = parent


def release(state: State) -> int:
    return -1


SPEC = PolicySpec("sieve", "lazy promotion, quick demotion", make_state, on_hit, on_insert, victim, on_evict, release)
