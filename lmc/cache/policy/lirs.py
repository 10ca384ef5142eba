"""LIRS (Jiang and Zhang, SIGMETRICS 2002) keeps chunks whose last two touches were close together; the others pass through a short queue.

The stack holds chunks in order of their last touch down to the oldest *low* one (a chunk of small reuse distance); the queue holds the
resident *high* ones, a hundredth of the capacity, in order of eviction. High chunks that left while in the stack stay there as ghosts, at
most twice the capacity. Every operation is amortised O(1).
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
    put_before,
    put_oldest,
    take_out,
    unlink,
)

NOWHERE, LOW, HIGH, GHOST, GONE = range(5)


class State(NamedTuple):
    stack: Lists
    queues: Lists  # of HIGH, GHOST and GONE nodes, by the numbers above
    chains: Chains
    where: Marks  # (num_nodes,)
    stacked: Marks  # (num_nodes,) 1: in the stack
    size: Int32  # (5,) nodes by place, those aside too
    limit: Int32  # (5,) low: its share; ghost: how many are remembered
    full: Marks  # (1,) 1 after the first eviction


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    low = capacity - max(1, capacity // 100)
    return State(
        stack=make_lists(num_nodes, 1),
        queues=make_lists(num_nodes, 5),
        chains=make_chains(num_nodes, parents),
        where=np.zeros(num_nodes, dtype=np.uint8),
        stacked=np.zeros(num_nodes, dtype=np.uint8),
        size=np.zeros(5, dtype=np.int32),
        limit=np.array([0, low, 0, 2 * capacity, 0], dtype=np.int32),
        full=np.zeros(1, dtype=np.uint8),
    )


def put(state: State, place: int, node: int) -> None:
    state.where[node] = place
    state.size[place] += 1
    if place != LOW:
        put_before(state.queues, head_of(state.queues, place), node)


def leave(state: State, node: int) -> None:
    place = state.where[node]
    state.size[place] -= 1
    if place != LOW:
        take_out(state.queues, state.chains, node)


def stack_top(state: State, node: int) -> None:
    if state.stacked[node]:
        unlink(state.stack, node)
    state.stacked[node] = 1
    put_before(state.stack, state.stack.older.size - 1, node)


def stack_out(state: State, node: int) -> None:
    unlink(state.stack, node)
    state.stacked[node] = 0


def prune(state: State) -> None:
    """Remove high nodes from the bottom of the stack until a low node is there: below the last low node a place tells nothing."""
    head = state.stack.older.size - 1
    node = state.stack.younger[head]
    while node != head and state.where[node] != LOW:
        stack_out(state, node)
        if state.where[node] == GHOST:
            leave(state, node)
            put(state, GONE, node)
        node = state.stack.younger[head]


def demote_lowest(state: State) -> None:
    node = state.stack.younger[state.stack.older.size - 1]
    stack_out(state, node)
    leave(state, node)
    put(state, HIGH, node)
    prune(state)


def become_low(state: State, node: int) -> None:
    leave(state, node)
    put(state, LOW, node)
    stack_top(state, node)
    prune(state)
    if state.size[LOW] > state.limit[LOW]:
        demote_lowest(state)


def on_hit(state: State, node: int, now: int) -> None:
    if state.where[node] == LOW:
        stack_top(state, node)
        prune(state)
    elif state.stacked[node]:
        become_low(state, node)
    else:
        stack_top(state, node)
        leave(state, node)
        put(state, HIGH, node)


def on_insert(state: State, node: int, now: int) -> None:
    place = state.where[node]
    if place == GHOST:
        become_low(state, node)
    else:
        if place == GONE:
            leave(state, node)
        unproven = state.full[0] == 1 or state.size[LOW] == state.limit[LOW]
        put(state, HIGH if unproven else LOW, node)
        stack_top(state, node)
    add_child(state.chains, node)


def low_may_go(state: State, holds: Holds) -> bool:
    """Whether a low node may be evicted. This is checked before the search, because a search without result must not demote all low nodes.

    It passes no more nodes than are then demoted."""
    head = state.stack.older.size - 1
    node = state.stack.younger[head]
    while node != head and (state.where[node] != LOW or holds[node] != 0):
        node = state.stack.younger[node]
    return bool(node != head)


def victim(state: State, holds: Holds) -> int:
    node = oldest_free(state.queues, head_of(state.queues, HIGH), state.chains, holds)
    if node < 0 and not low_may_go(state, holds):
        return -1
    while node < 0:
        demote_lowest(state)
        node = oldest_free(state.queues, head_of(state.queues, HIGH), state.chains, holds)
    return node


def on_evict(state: State, node: int) -> None:
    state.full[0] = 1
    was_low = state.where[node] == LOW
    leave(state, node)
    if was_low:
        stack_out(state, node)
    put(state, GHOST if state.stacked[node] else GONE, node)
    if was_low:
        prune(state)
    parent = drop_child(state.chains, node)
    if parent >= 0:
        put_oldest(state.queues, head_of(state.queues, HIGH), parent)


def release(state: State) -> int:
    place = GONE if state.size[GONE] > 0 else GHOST
    if state.size[place] <= state.limit[place]:
        return -1
    node = state.queues.younger[head_of(state.queues, place)]
    leave(state, node)
    if place == GHOST:
        stack_out(state, node)
    state.where[node] = NOWHERE
    return int(node)


def set_ghosts(state: State, most: int) -> None:
    state.limit[GHOST] = most


SPEC = PolicySpec(
    "lirs",
    "keeps chunks whose reuse distance is low",
    make_state,
    on_hit,
    on_insert,
    victim,
    on_evict,
    release,
    ghosts=2.0,
    set_ghosts=set_ghosts,
)
