"""S3-FIFO (Yang et al., SOSP 2023): new chunks pass through a small queue.

Those that are hit there, or seen again soon after, move to the main queue.

Small holds a tenth of the capacity, ghosts are as many as the main queue's places. Every operation is amortised O(1): a pass of a queue
costs one of at most three marks of the node.
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
    put,
    put_before,
    put_oldest,
    set_aside,
    take_out,
    unlink,
)

NOWHERE, SMALL, MAIN, GHOST, GONE = range(5)
MOST_HITS = 3
HITS_TO_MAIN = 2  # as the authors' code: one hit may belong to the burst that stored it


class State(NamedTuple):
    queues: Lists  # by the numbers above
    chains: Chains
    where: Marks  # (num_nodes,)
    hits: Marks  # (num_nodes,) capped
    size: Int32  # (5,) nodes by place, those aside too
    limit: Int32  # (5,) small: its share; main: the rest; ghost: how many are remembered
    full: Marks  # (1,) 1 after the first eviction


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    small = capacity // 10
    return State(
        queues=make_lists(num_nodes, 5),
        chains=make_chains(num_nodes, parents),
        where=np.zeros(num_nodes, dtype=np.uint8),
        hits=np.zeros(num_nodes, dtype=np.uint8),
        size=np.zeros(5, dtype=np.int32),
        limit=np.array([0, small, capacity - small, capacity * 9 // 10, 0], dtype=np.int32),
        full=np.zeros(1, dtype=np.uint8),
    )


def on_hit(state: State, node: int, now: int) -> None:
    if state.hits[node] < MOST_HITS:
        state.hits[node] += 1


def on_insert(state: State, node: int, now: int) -> None:
    place = state.where[node]
    if place != NOWHERE:
        unlink(state.queues, node)
        state.size[place] -= 1
    state.hits[node] = 0
    # Before the first eviction small passes what it cannot hold straight on.
    to_main = place == GHOST or (state.full[0] == 0 and state.size[SMALL] >= state.limit[SMALL])
    put(state, MAIN if to_main else SMALL, node)
    add_child(state.chains, node)


def victim(state: State, holds: Holds) -> int:
    """Return the oldest node of one queue that may be evicted, else of the other.

    On the way, nodes that were hit move to main, or get another round there.

    One loop for both queues, because compiled code that searches in two places runs at half the speed.
    """
    queues, hits = state.queues, state.hits
    place = MAIN if state.size[MAIN] > state.limit[MAIN] or state.size[SMALL] == 0 else SMALL
    head = head_of(state.queues, place)
    node = queues.younger[head]
    ends = 0
    while ends < 2:
        following = queues.younger[node]
        if node == head:
            ends += 1
            place = SMALL + MAIN - place
            head = head_of(state.queues, place)
            following = queues.younger[head]
        elif place == SMALL and hits[node] >= HITS_TO_MAIN:
            unlink(queues, node)
            state.size[SMALL] -= 1
            hits[node] = 0
            put(state, MAIN, node)
        elif place == MAIN and hits[node] > 0:
            hits[node] -= 1
            unlink(queues, node)
            put_before(queues, head, node)
            if following == head:
                following = queues.younger[head]
        elif holds[node] == 0:
            return int(node)
        elif state.chains.children[node] > 0:
            set_aside(queues, state.chains, node)
        node = following
    return -1


def on_evict(state: State, node: int) -> None:
    state.full[0] = 1
    place = state.where[node]
    take_out(state.queues, state.chains, node)
    state.size[place] -= 1
    put(state, GHOST if place == SMALL else GONE, node)
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
    "s3fifo",
    "small queue, main queue and ghosts, all FIFO",
    make_state,
    on_hit,
    on_insert,
    victim,
    on_evict,
    release,
    ghosts=1.0,
    set_ghosts=set_ghosts,
)
