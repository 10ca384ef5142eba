"""FIFO evicts, among the chunks without resident children, the one that was stored longest ago. Every operation is amortised O(1)."""

from __future__ import annotations

from typing import NamedTuple

from lmc.cache.policy.base import Holds, Parents, PolicySpec
from lmc.cache.policy.lists import (
    Chains,
    Lists,
    add_child,
    drop_child,
    make_chains,
    make_lists,
    oldest_free,
    put_before,
    put_oldest,
    take_out,
)


class State(NamedTuple):
    queue: Lists
    chains: Chains


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    return State(make_lists(num_nodes, 1), make_chains(num_nodes, parents))


def on_hit(state: State, node: int, now: int) -> None:
    return


def on_insert(state: State, node: int, now: int) -> None:
    put_before(state.queue, state.queue.older.size - 1, node)
    add_child(state.chains, node)


def victim(state: State, holds: Holds) -> int:
    return oldest_free(state.queue, state.queue.older.size - 1, state.chains, holds)


def on_evict(state: State, node: int) -> None:
    take_out(state.queue, state.chains, node)
    parent = drop_child(state.chains, node)
    if parent >= 0:
        put_oldest(state.queue, state.queue.older.size - 1, parent)


def release(state: State) -> int:
    return -1


SPEC = PolicySpec("fifo", "first stored, first out", make_state, on_hit, on_insert, victim, on_evict, release)
