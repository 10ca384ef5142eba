"""ARC (Megiddo and Modha, FAST 2003) has one LRU list for chunks seen once and one for chunks seen again; ghosts of both balance the lists.

A host makes room before it says which chunk comes, so the balance moves when a ghost is stored, after the eviction; the paper moves it just
before. Every operation is amortised O(1).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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
    put_oldest,
    take_out,
    unlink,
)

NOWHERE, ONCE, AGAIN, ONCE_GHOST, AGAIN_GHOST = range(5)  # in the paper: -, T1, T2, B1, B2


class State(NamedTuple):
    queues: Lists  # by the numbers above
    chains: Chains
    where: Marks  # (num_nodes,)
    size: Int32  # (5,) nodes by place, those aside too
    capacity: Int32  # (1,)
    limit: Int32  # (2,) nodes of ONCE with its ghosts, and all nodes with all ghosts
    target: npt.NDArray[np.float64]  # (1,) wanted size of ONCE, p in the paper


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    return State(
        queues=make_lists(num_nodes, 5),
        chains=make_chains(num_nodes, parents),
        where=np.zeros(num_nodes, dtype=np.uint8),
        size=np.zeros(5, dtype=np.int32),
        capacity=np.full(1, capacity, dtype=np.int32),
        limit=np.array([capacity, 2 * capacity], dtype=np.int32),
        target=np.zeros(1, dtype=np.float64),
    )


def on_hit(state: State, node: int, now: int) -> None:
    take_out(state.queues, state.chains, node)
    state.size[state.where[node]] -= 1
    put(state, AGAIN, node)


def on_insert(state: State, node: int, now: int) -> None:
    place = state.where[node]
    size = state.size
    if place == ONCE_GHOST:
        step = max(1.0, size[AGAIN_GHOST] / size[ONCE_GHOST])
        state.target[0] = min(state.target[0] + step, float(state.capacity[0]))
    elif place == AGAIN_GHOST:
        step = max(1.0, size[ONCE_GHOST] / size[AGAIN_GHOST])
        state.target[0] = max(state.target[0] - step, 0.0)
    if place != NOWHERE:
        unlink(state.queues, node)
        size[place] -= 1
    put(state, ONCE if place == NOWHERE else AGAIN, node)
    add_child(state.chains, node)


def victim(state: State, holds: Holds) -> int:
    first, second = AGAIN, ONCE
    if state.size[ONCE] > state.target[0] or state.size[AGAIN] == 0:
        first, second = ONCE, AGAIN
    node = oldest_free(state.queues, head_of(state.queues, first), state.chains, holds)
    if node < 0:
        node = oldest_free(state.queues, head_of(state.queues, second), state.chains, holds)
    return node


def on_evict(state: State, node: int) -> None:
    place = state.where[node]
    take_out(state.queues, state.chains, node)
    state.size[place] -= 1
    put(state, ONCE_GHOST if place == ONCE else AGAIN_GHOST, node)
    parent = drop_child(state.chains, node)
    if parent >= 0:
        put_oldest(state.queues, head_of(state.queues, state.where[parent]), parent)


def release(state: State) -> int:
    size = state.size
    if size[ONCE_GHOST] > 0 and size[ONCE] + size[ONCE_GHOST] > state.limit[0]:
        place = ONCE_GHOST
    elif size[AGAIN_GHOST] > 0 and size[ONCE] + size[AGAIN] + size[ONCE_GHOST] + size[AGAIN_GHOST] > state.limit[1]:
        place = AGAIN_GHOST
    else:
        return -1
    node = state.queues.younger[head_of(state.queues, place)]
    unlink(state.queues, node)
    size[place] -= 1
    state.where[node] = NOWHERE
    return int(node)


def set_ghosts(state: State, most: int) -> None:
    state.limit[0] = most
    state.limit[1] = state.capacity[0] + most


SPEC = PolicySpec(
    "arc",
    "balances recency and frequency by what its ghosts say",
    make_state,
    on_hit,
    on_insert,
    victim,
    on_evict,
    release,
    ghosts=1.0,
    set_ghosts=set_ghosts,
)
