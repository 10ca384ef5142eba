"""LFU evicts the chunk with the fewest touches since it was stored; among equals, the one that was touched longest ago.

Chunks of equal count share a list, a *level*; levels form a list in order of their count. Every operation is O(1), except that the
search passes levels whose nodes are all set aside.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmc.cache.policy.base import Holds, Parents, PolicySpec
from lmc.cache.policy.lists import (
    Chains,
    Int32,
    Lists,
    add_child,
    drop_child,
    make_chains,
    make_lists,
    oldest_free,
    put_before,
    put_oldest,
    take_out,
    unlink,
)


class State(NamedTuple):
    nodes: Lists  # one list for each level
    chains: Chains
    level: Int32  # (num_nodes,) the level of a resident node
    levels: Lists  # one list: its oldest has the lowest count
    touches: Int32  # (num_levels + 1,) how often a level's nodes were touched
    size: Int32  # (num_levels,) its nodes, those aside too
    spare: Int32  # (num_levels + 1,) unused levels; the last entry is how many


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    num_levels = min(num_nodes, capacity) + 1  # one more while a node changes level
    spare = np.arange(num_levels + 1, dtype=np.int32)
    return State(
        nodes=make_lists(num_nodes, num_levels),
        chains=make_chains(num_nodes, parents),
        level=np.zeros(num_nodes, dtype=np.int32),
        levels=make_lists(num_levels, 1),
        touches=np.zeros(num_levels + 1, dtype=np.int32),
        size=np.zeros(num_levels, dtype=np.int32),
        spare=spare,
    )


def head_of(state: State, level: int) -> int:
    return state.nodes.older.size - 1 - level


def enter(state: State, node: int, count: int, after: int) -> None:
    """Put node into the level of `count`. That level follows level `after` (the head for the first); it is made if it does not exist."""
    level = state.levels.younger[after]
    top = state.levels.older.size - 1
    if level == top or state.touches[level] != count:
        state.spare[-1] -= 1
        fresh = state.spare[state.spare[-1]]
        put_before(state.levels, level, fresh)
        state.touches[fresh] = count
        level = fresh
    state.level[node] = level
    state.size[level] += 1
    put_before(state.nodes, head_of(state, level), node)


def leave(state: State, level: int) -> None:
    state.size[level] -= 1
    if state.size[level] == 0:
        unlink(state.levels, level)
        state.spare[state.spare[-1]] = level
        state.spare[-1] += 1


def on_hit(state: State, node: int, now: int) -> None:
    level = state.level[node]
    take_out(state.nodes, state.chains, node)
    enter(state, node, state.touches[level] + 1, level)
    leave(state, level)


def on_insert(state: State, node: int, now: int) -> None:
    enter(state, node, 1, state.levels.older.size - 1)
    add_child(state.chains, node)


def victim(state: State, holds: Holds) -> int:
    top = state.levels.older.size - 1
    level = state.levels.younger[top]
    while level != top:
        node = oldest_free(state.nodes, head_of(state, level), state.chains, holds)
        if node >= 0:
            return node
        level = state.levels.younger[level]
    return -1


def on_evict(state: State, node: int) -> None:
    take_out(state.nodes, state.chains, node)
    leave(state, state.level[node])
    parent = drop_child(state.chains, node)
    if parent >= 0:
        put_oldest(state.nodes, head_of(state, state.level[parent]), parent)


def release(state: State) -> int:
    return -1


SPEC = PolicySpec("lfu", "least frequently used", make_state, on_hit, on_insert, victim, on_evict, release)
