"""Predictive: evict the chunk that is expected to bring the fewest hits, as learned from what happened to chunks like it.

At each touch a chunk falls into a class: how often it was touched before, how far from the end of the request it stands, and how many new
chunks the request brings. reuse.py learns what becomes of a class by age; ghosts, four for each place, tell it of mistakes. Chunks of one
class and age bin share a list, oldest first; a tournament tree holds the value of each list, and the victim is the oldest chunk of the list
with the least. Nothing is set per workload, and before anything is learned the order is that of LRU.

A touch is amortised O(1) but for the tree, whose depth is fixed; each crossing of an age bin, at most some dozens in a life, is O(1) too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmc.cache.policy.base import Blocked, Parents, PolicySpec
from lmc.cache.policy.lists import (
    Chains,
    Int32,
    Lists,
    Marks,
    add_child,
    drop_child,
    make_chains,
    make_lists,
    move_run,
    oldest_free,
    put_before,
    put_oldest,
    take_out,
    unlink,
)
from lmc.cache.policy.reuse import (
    HORIZON,
    NUM_BINS,
    Float64,
    Int64,
    Life,
    appraise,
    count,
    make_life,
)

NOWHERE, RESIDENT, GHOST = range(3)
GHOSTS = 4  # for each place
STEPS = 4  # each feature of a class has so many values
NUM_CLASSES = STEPS**3
NUM_LISTS = NUM_CLASSES * NUM_BINS
LEAVES = 4096  # of the tree: a power of two, at least NUM_LISTS
EMPTY = 1e300
SMOOTH = 0.01  # weight of the newest request in the running means

# Entries of State.counter
NOW, POSITION, NEW, HITS, TOUCHES, DUE, TURN, NUM_GHOSTS, CAPACITY = range(9)
# Entries of State.mean, each per request
MEAN_CHUNKS, MEAN_NEW, MEAN_HITS = range(3)


class State(NamedTuple):
    lists: Lists  # one for each class and bin, then the ghosts
    chains: Chains
    recency: Lists  # one list of all resident nodes
    edges: Int32  # (NUM_BINS,) the oldest node of bin k or a lower one: the next to leave bin k. The head where there is none
    where: Marks  # (num_nodes,)
    last: Int32  # (num_nodes,) the request of the last touch
    uses: Marks  # (num_nodes,) touches before the last one, as far as is remembered, below STEPS
    kind: Marks  # (num_nodes,) class
    bins: Marks  # (num_nodes,) age bin
    life: Life
    tree: Float64  # (2 * LEAVES,) the least value below each inner node; leaves are the lists' values, or EMPTY
    held: Int32  # (NUM_LISTS,) lists that a search left out because all their nodes are pinned
    counter: Int64
    mean: Float64


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    counter = np.zeros(9, dtype=np.int64)
    counter[CAPACITY] = capacity
    return State(
        lists=make_lists(num_nodes, NUM_LISTS + 1),
        chains=make_chains(num_nodes, parents),
        recency=make_lists(num_nodes, 1),
        edges=np.full(NUM_BINS, num_nodes, dtype=np.int32),
        where=np.zeros(num_nodes, dtype=np.uint8),
        last=np.zeros(num_nodes, dtype=np.int32),
        uses=np.zeros(num_nodes, dtype=np.uint8),
        kind=np.zeros(num_nodes, dtype=np.uint8),
        bins=np.zeros(num_nodes, dtype=np.uint8),
        life=make_life(NUM_CLASSES),
        tree=np.full(2 * LEAVES, EMPTY, dtype=np.float64),
        held=np.zeros(NUM_LISTS, dtype=np.int32),
        counter=counter,
        mean=np.array([8.0, 8.0, 0.0], dtype=np.float64),
    )


# The functions below get the arrays that they need, not the state: compiled code copies what it passes on.


def head_of(lists: Lists, number: int) -> int:
    return lists.older.size - 1 - number


def set_leaf(tree: Float64, number: int, value: float) -> None:
    place = LEAVES + number
    if tree[place] == value:
        return
    tree[place] = value
    while place > 1:
        place //= 2
        least = min(tree[2 * place], tree[2 * place + 1])
        if tree[place] == least:
            return
        tree[place] = least


def show(lists: Lists, tree: Float64, value: Float64, number: int) -> None:
    """Bring the tree up to date with a list."""
    head = head_of(lists, number)
    set_leaf(tree, number, EMPTY if lists.younger[head] == head else value[number])


def list_of(state: State, node: int) -> int:
    return int(state.kind[node]) * NUM_BINS + int(state.bins[node])


def enlist(lists: Lists, tree: Float64, value: Float64, number: int, node: int) -> None:
    put_before(lists, head_of(lists, number), node)
    show(lists, tree, value, number)


def delist(lists: Lists, chains: Chains, tree: Float64, value: Float64, number: int, node: int) -> None:
    take_out(lists, chains, node)
    show(lists, tree, value, number)


def learn(state: State, kind: int) -> None:
    """Appraise a class anew and show its lists."""
    capacity = float(state.counter[CAPACITY])
    horizon = HORIZON * capacity / max(1.0, state.mean[MEAN_NEW])
    appraise(state.life, kind, max(1.0, horizon), state.mean[MEAN_CHUNKS], state.mean[MEAN_HITS] / capacity)
    for number in range(kind * NUM_BINS, (kind + 1) * NUM_BINS):
        show(state.lists, state.tree, state.life.value, number)


def begin_request(state: State, node: int, now: int) -> None:
    """node is the last chunk of a new request: close the books of the one before, count new chunks, let time pass."""
    counter, mean = state.counter, state.mean
    if counter[NOW] > 0:
        mean[MEAN_CHUNKS] += SMOOTH * (counter[POSITION] - mean[MEAN_CHUNKS])
        mean[MEAN_HITS] += SMOOTH * (counter[HITS] - mean[MEAN_HITS])
        mean[MEAN_NEW] += SMOOTH * (counter[POSITION] - counter[HITS] - mean[MEAN_NEW])
    counter[NOW] = now
    counter[POSITION] = 0
    counter[HITS] = 0
    counter[NEW] = 0
    while node >= 0 and state.where[node] != RESIDENT:
        counter[NEW] += 1
        node = state.chains.parents[node]
    pass_time(state)


def pass_time(state: State) -> None:
    """Move the nodes that have come to the end of their age bin, neighbours together."""
    lists, younger, bins = state.lists, state.recency.younger, state.bins
    now = state.counter[NOW]
    head = state.recency.older.size - 1
    for k in range(NUM_BINS - 1):
        due = now - state.life.lower[k + 1]
        node = state.edges[k]
        while node != head and state.last[node] <= due:
            number = list_of(state, node)
            first = node
            last = node
            bins[node] = k + 1
            touches = 1
            node = younger[node]
            if not state.chains.aside[first]:
                while node != head and state.last[node] <= due and lists.younger[last] == node:
                    last = node
                    bins[node] = k + 1
                    touches += 1
                    node = younger[node]
                move_run(lists, first, last, head_of(lists, number + 1))
                show(lists, state.tree, state.life.value, number)
                show(lists, state.tree, state.life.value, number + 1)
            count(state.life.reached, state.kind[first], k + 1, touches)
        state.edges[k] = node


def step(amount: int, base: int) -> int:
    """0 for less than base, then one more for each power of it, below STEPS."""
    result = 0
    while amount >= base and result < STEPS - 1:
        amount //= base
        result += 1
    return result


def start_life(state: State, node: int) -> None:
    """A touch: into a class, youngest of its first bin and of all."""
    counter = state.counter
    kind = (int(state.uses[node]) * STEPS + step(counter[POSITION] + 1, 2)) * STEPS + step(counter[NEW], 4)
    counter[POSITION] += 1
    if state.life.reached[kind, 0] == 0.0:
        learn(state, kind)
    state.kind[node] = kind
    state.bins[node] = 0
    state.last[node] = counter[NOW]
    count(state.life.reached, kind, 0, 1)
    enlist(state.lists, state.tree, state.life.value, list_of(state, node), node)
    head = state.recency.older.size - 1
    put_before(state.recency, head, node)
    k = 0
    while k < NUM_BINS and state.edges[k] == head:
        state.edges[k] = node
        k += 1

    counter[TOUCHES] += 1
    counter[DUE] -= 1
    if counter[DUE] <= 0:  # often at first, then each class once while the cache is touched through
        counter[DUE] = max(4, min(max(64, counter[CAPACITY] // NUM_CLASSES), counter[TOUCHES] // (2 * NUM_CLASSES)))
        turn = (counter[TURN] + 1) % NUM_CLASSES
        while state.life.reached[turn, 0] == 0.0:
            turn = (turn + 1) % NUM_CLASSES
        counter[TURN] = turn
        learn(state, turn)


def out_of_recency(state: State, node: int) -> None:
    k = int(state.bins[node])
    while k < NUM_BINS and state.edges[k] == node:
        state.edges[k] = state.recency.younger[node]
        k += 1
    unlink(state.recency, node)


def catch_up(state: State, node: int) -> None:
    """Count the age bins that a ghost has passed."""
    age = state.counter[NOW] - state.last[node]
    while age >= state.life.lower[state.bins[node] + 1]:
        state.bins[node] += 1
        count(state.life.reached, state.kind[node], state.bins[node], 1)


def on_hit(state: State, node: int, now: int) -> None:
    if state.counter[NOW] != now:
        begin_request(state, node, now)
    state.counter[HITS] += 1
    delist(state.lists, state.chains, state.tree, state.life.value, list_of(state, node), node)
    out_of_recency(state, node)
    count(state.life.reused, state.kind[node], state.bins[node], 1)
    state.uses[node] = min(int(state.uses[node]) + 1, STEPS - 1)
    start_life(state, node)


def on_insert(state: State, node: int, now: int) -> None:
    if state.counter[NOW] != now:
        begin_request(state, node, now)
    if state.where[node] == GHOST:
        unlink(state.lists, node)
        state.counter[NUM_GHOSTS] -= 1
        catch_up(state, node)
        count(state.life.reused, state.kind[node], state.bins[node], 1)
        state.uses[node] = min(int(state.uses[node]) + 1, STEPS - 1)
    else:
        state.uses[node] = 0
    state.where[node] = RESIDENT
    start_life(state, node)
    add_child(state.chains, node)


def victim(state: State, blocked: Blocked) -> int:
    tree = state.tree
    num_held = 0
    node = -1
    while node < 0 and tree[1] != EMPTY:
        place = 1
        while place < LEAVES:
            place *= 2
            if tree[place] != tree[place // 2]:
                place += 1
        number = place - LEAVES
        node = oldest_free(state.lists, head_of(state.lists, number), state.chains, blocked)
        if node < 0:
            state.held[num_held] = number
            num_held += 1
            set_leaf(tree, number, EMPTY)
    for index in range(num_held):
        show(state.lists, state.tree, state.life.value, state.held[index])
    return node


def on_evict(state: State, node: int) -> None:
    delist(state.lists, state.chains, state.tree, state.life.value, list_of(state, node), node)
    out_of_recency(state, node)
    state.where[node] = GHOST
    state.counter[NUM_GHOSTS] += 1
    put_before(state.lists, head_of(state.lists, NUM_LISTS), node)
    parent = drop_child(state.chains, node)
    if parent >= 0:
        number = list_of(state, parent)
        put_oldest(state.lists, head_of(state.lists, number), parent)
        show(state.lists, state.tree, state.life.value, number)


def release(state: State) -> int:
    if state.counter[NUM_GHOSTS] <= GHOSTS * state.counter[CAPACITY]:
        return -1
    node = state.lists.younger[head_of(state.lists, NUM_LISTS)]
    unlink(state.lists, node)
    state.counter[NUM_GHOSTS] -= 1
    state.where[node] = NOWHERE
    catch_up(state, node)
    return int(node)


SPEC = PolicySpec(
    "predictive",
    "fewest expected hits, learned by class and age",
    make_state,
    on_hit,
    on_insert,
    victim,
    on_evict,
    release,
    ghosts=float(GHOSTS),
)
