"""2Q (Johnson and Shasha, VLDB 1994, the full version): a chunk that is seen again after it left the FIFO queue enters the LRU list.

The FIFO queue keeps a quarter of the capacity, ghosts of it are half as many as the capacity. Every operation is amortised O(1).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmc.cache.policy.base import Holds, Parents, PolicySpec
from lmc.cache.policy.lists import (
    Chains,
    Int32,
    Lists,
    Marks,
    add_child,
    drop_child,
    head_of,
    make_chains,
    make_lists,
    oldest_free,
    put,
    put_before,
    put_oldest,
    take_out,
    unlink,
)

NOWHERE, FRESH, FREQUENT, GHOST, GONE = range(5)


class State(NamedTuple):
    queues: Lists  # by the numbers above
    chains: Chains
    where: Marks  # (num_nodes,)
    size: Int32  # (5,) nodes by place, those aside too
    limit: Int32  # (5,) fresh: its share; ghost: how many are remembered


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    return State(
        queues=make_lists(num_nodes, 5),
        chains=make_chains(num_nodes, parents),
        where=np.zeros(num_nodes, dtype=np.uint8),
        size=np.zeros(5, dtype=np.int32),
        limit=np.array([0, max(1, capacity // 4), 0, max(1, capacity // 2), 0], dtype=np.int32),
    )


def on_hit(state: State, node: int, now: int) -> None:
    if state.where[node] == FREQUENT:
        take_out(state.queues, state.chains, node)
        put_before(state.queues, head_of(state.queues, FREQUENT), node)


def on_insert(state: State, node: int, now: int) -> None:
    place = state.where[node]
    if place != NOWHERE:
        unlink(state.queues, node)
        state.size[place] -= 1
    put(state, FREQUENT if place == GHOST else FRESH, node)
    add_child(state.chains, node)


def victim(state: State, holds: Holds) -> int:
    first, second = FRESH, FREQUENT
    if state.size[FRESH] <= state.limit[FRESH] and state.size[FREQUENT] > 0:
        first, second = FREQUENT, FRESH
    node = oldest_free(state.queues, head_of(state.queues, first), state.chains, holds)
    if node < 0:
        node = oldest_free(state.queues, head_of(state.queues, second), state.chains, holds)
    return node


def on_evict(state: State, node: int) -> None:
    place = state.where[node]
    take_out(state.queues, state.chains, node)
    state.size[place] -= 1
    put(state, GHOST if place == FRESH else GONE, node)
    parent = drop_child(state.chains, node)
    if parent >= 0:
        put_oldest(state.queues, head_of(state.queues, state.where[parent]), parent)


def release(state: State) -> int:
    place = GONE if state.size[GONE] > 0 else GHOST
    if state.size[place] <= state.limit[place]:
        return -1
    node = state.queues.younger[head_of(state.queues, place)]
    unlink(state.queues, node)
    state.size[place] -= 1
    state.where[node] = NOWHERE
    return int(node)


def set_ghosts(state: State, most: int) -> None:
    state.limit[GHOST] = most


SPEC = PolicySpec(
    "2q",
    "FIFO for new chunks, LRU for proven ones",
    make_state,
    on_hit,
    on_insert,
    victim,
    on_evict,
    release,
    ghosts=0.5,
    set_ghosts=set_ghosts,
)
