"""Groups of the predictive policy: chunks of one class that one request touched. They age together, and lists of groups have a value each.

predictive.py says what the classes mean, and which chunk is evicted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmc.cache.policy.base import Parents
from lmc.cache.policy.lists import (
    Chains,
    Int32,
    Lists,
    Marks,
    head_of,
    make_chains,
    make_lists,
    put_before,
    unlink,
)
from lmc.cache.policy.reuse import NUM_BINS, Int64, Life, appraise, count, make_life
from lmc.cache.policy.tournament import EMPTY, Float64, make_tree, set_leaf

NOWHERE, RESIDENT, GHOST = range(3)
GHOSTS = 4  # for each place
STEPS = 4  # each feature of a class has so many values
BODY, LAST, SHARED, OVERTAKEN = 0, STEPS**2, 2 * STEPS**2, 3 * STEPS**2  # the first class of each kind
TOLD, TOLD_LAST = OVERTAKEN + 1, OVERTAKEN + 1 + STEPS**2  # as BODY and LAST, of requests whose class the host was told
NUM_CLASSES = TOLD_LAST + STEPS**2
NUM_LISTS = NUM_CLASSES * NUM_BINS
LEAVES = 4096  # of the tree: a power of two, at least NUM_LISTS
MOST = 250  # touches and turns are counted up to here
SMOOTH = 0.01  # weight of the newest request in the mean
APPRAISALS = 192  # while the cache is touched through, but 64 touches apart or more

# Entries of State.counter
NOW, LENGTH, TURN, KIND, TOUCHES, DUE, NEXT, NUM_GHOSTS, CAPACITY, FREE, LOWEST, LEFT, MOST_GHOSTS, REQUEST_CLASS = (
    range(14)
)


class State(NamedTuple):
    members: Lists  # chunks that may be chosen, one list for each group; the last list is all ghosts
    chains: Chains
    where: Marks  # (num_nodes,)
    uses: Marks  # (num_nodes,) touches before the last one, as far as is remembered
    turns: Marks  # (num_nodes,) turn of the request that touched it last, the first is 0
    child: Int32  # (num_nodes,) the chunk that came next in the request that touched it last, or -1
    group: Int32  # (num_nodes,) of nodes that are somewhere
    lists: Lists  # groups that have members, one list for each class and bin
    recency: Lists  # one list of all groups; free groups are chained by `younger`
    edges: Int32  # (NUM_BINS,) the oldest group of bin k or a lower one: the next to leave bin k. The head where there is none
    size: Int32  # (num_nodes,) nodes of a group: members, those aside, and ghosts
    last: Int32  # (num_nodes,) the request that touched a group
    kind: Marks  # (num_nodes,) class of a group
    bins: Marks  # (num_nodes,) age bin of a group
    newest: Int32  # (NUM_CLASSES,) the group that was opened last, or -1
    life: Life
    tree: Float64  # (2 * LEAVES,) the least value below each inner node; leaves are the lists' values, or EMPTY
    held: Int32  # (NUM_LISTS,) lists that a search left out because all their nodes are pinned
    counter: Int64
    chunks: Float64  # (1,) mean chunks of a request


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    counter = np.zeros(14, dtype=np.int64)
    counter[LEFT] = -1
    counter[CAPACITY] = capacity
    counter[MOST_GHOSTS] = GHOSTS * capacity
    recency = make_lists(num_nodes, 1)
    recency.younger[:num_nodes] = np.arange(1, num_nodes + 1, dtype=np.int32)  # all free
    return State(
        members=make_lists(num_nodes, num_nodes + 1),
        chains=make_chains(num_nodes, parents),
        where=np.zeros(num_nodes, dtype=np.uint8),
        uses=np.zeros(num_nodes, dtype=np.uint8),
        turns=np.zeros(num_nodes, dtype=np.uint8),
        child=np.full(num_nodes, -1, dtype=np.int32),
        group=np.zeros(num_nodes, dtype=np.int32),
        lists=make_lists(num_nodes, NUM_LISTS),
        recency=recency,
        edges=np.full(NUM_BINS, num_nodes, dtype=np.int32),
        size=np.zeros(num_nodes, dtype=np.int32),
        last=np.zeros(num_nodes, dtype=np.int32),
        kind=np.zeros(num_nodes, dtype=np.uint8),
        bins=np.zeros(num_nodes, dtype=np.uint8),
        newest=np.full(NUM_CLASSES, -1, dtype=np.int32),
        life=make_life(NUM_CLASSES),
        tree=make_tree(LEAVES),
        held=np.zeros(NUM_LISTS, dtype=np.int32),
        counter=counter,
        chunks=np.full(1, 8.0, dtype=np.float64),
    )


# Some functions below get the arrays that they need, not the state: compiled code copies what it passes on.


def ghosts_of(state: State) -> int:
    """Return the head of the ghosts' list, which follows the heads of all groups."""
    return head_of(state.members, state.size.size)


def is_empty(lists: Lists, number: int) -> bool:
    head = head_of(lists, number)
    return bool(lists.younger[head] == head)


def show(lists: Lists, tree: Float64, value: Float64, number: int) -> None:
    """Bring the tree up to date with a list."""
    set_leaf(tree, number, EMPTY if is_empty(lists, number) else value[number])


def learn(state: State, kind: int) -> None:
    """Compute the values of a class anew, and update the tree for its lists."""
    appraise(state.life, kind, float(state.chunks[0]))
    for number in range(kind * NUM_BINS, (kind + 1) * NUM_BINS):
        if not is_empty(state.lists, number):
            set_leaf(state.tree, number, state.life.value[number])


# Groups


def list_of(state: State, group: int) -> int:
    return int(state.kind[group]) * NUM_BINS + int(state.bins[group])


def enter(state: State, group: int, kind: int) -> None:
    """Add a group of the current request as the youngest group."""
    recency = state.recency
    if state.newest[kind] < 0:
        learn(state, kind)
    state.kind[group] = kind
    state.bins[group] = 0
    state.last[group] = state.counter[NOW]
    state.newest[kind] = group
    head = head_of(recency, 0)
    put_before(recency, head, group)
    k = 0
    while k < NUM_BINS and state.edges[k] == head:
        state.edges[k] = group
        k += 1


def leave(state: State, group: int) -> None:
    """Remove a group from the order of ages."""
    k = int(state.bins[group])
    while k < NUM_BINS and state.edges[k] == group:
        state.edges[k] = state.recency.younger[group]
        k += 1
    unlink(state.recency, group)


def open_group(state: State, kind: int) -> int:
    """Take a free group, which has no members yet."""
    group = int(state.counter[FREE])
    state.counter[FREE] = state.recency.younger[group]
    enter(state, group, kind)
    return group


def shrink(state: State, group: int) -> None:
    """Count one node less in a group. A group without nodes becomes free."""
    state.size[group] -= 1
    if state.size[group] == 0:
        leave(state, group)
        state.recency.younger[group] = state.counter[FREE]
        state.counter[FREE] = group


def show_group(state: State, group: int) -> None:
    """Append a group to its list as the youngest one."""
    number = list_of(state, group)
    put_before(state.lists, head_of(state.lists, number), group)
    show(state.lists, state.tree, state.life.value, number)


def hide_if_empty(state: State, group: int) -> None:
    if is_empty(state.members, group):
        hide(state, group)


def hide(state: State, group: int) -> None:
    unlink(state.lists, group)
    show(state.lists, state.tree, state.life.value, list_of(state, group))


def overtake(state: State) -> None:
    """Move the groups of the request whose path the current one has left to the class of overtaken chunks.

    They are neighbours in recency.
    """
    child = int(state.counter[LEFT])
    state.counter[LEFT] = -1
    if child < 0 or state.where[child] == NOWHERE:
        return
    recency, last = state.recency, state.last
    head = head_of(recency, 0)
    group = int(state.group[child])
    request = last[group]
    while recency.older[group] != head and last[recency.older[group]] == request:
        group = int(recency.older[group])
    while group != head and last[group] == request:
        following = int(recency.younger[group])
        if state.kind[group] != OVERTAKEN:
            chosen_from = not is_empty(state.members, group)
            if chosen_from:
                hide(state, group)
            leave(state, group)
            enter(state, group, OVERTAKEN)
            if chosen_from:
                show_group(state, group)
        group = following


def take_member(state: State, node: int) -> None:
    """Take a node out of its group, so that it can't be chosen."""
    if state.chains.aside[node]:
        state.chains.aside[node] = 0
    else:
        unlink(state.members, node)
        hide_if_empty(state, state.group[node])


def pass_time(state: State) -> None:
    """Move the groups that have come to the end of their age bin."""
    lists, recency, life, tree = state.lists, state.recency, state.life, state.tree
    now = state.counter[NOW]
    head = head_of(recency, 0)
    oldest = recency.younger[head]
    for k in range(NUM_BINS - 1):
        due = now - life.lower[k + 1]
        group = state.edges[k]
        if group == oldest and (group == head or state.last[group] > due):
            return  # nor is it due in a later bin
        while group != head and state.last[group] <= due:
            number = list_of(state, group)
            state.bins[group] = k + 1
            count(life.reached, state.kind[group], k + 1, state.size[group])
            if not is_empty(state.members, group):
                unlink(lists, group)
                put_before(lists, head_of(lists, number + 1), group)
                show(lists, tree, life.value, number)
                show(lists, tree, life.value, number + 1)
            group = recency.younger[group]
        state.edges[k] = group


def end_request(state: State) -> None:
    """Count what the request touched, and every few requests compute the values of one more class."""
    counter, recency = state.counter, state.recency
    head = head_of(recency, 0)
    group = recency.older[head]
    while group != head and state.last[group] == counter[NOW]:
        count(state.life.reached, state.kind[group], 0, state.size[group])
        group = recency.older[group]
    state.chunks[0] += SMOOTH * (counter[LENGTH] - state.chunks[0])
    counter[TOUCHES] += counter[LENGTH]
    counter[DUE] -= counter[LENGTH]
    if counter[DUE] <= 0:  # often at first
        pace = max(64, int(counter[CAPACITY]) // APPRAISALS)
        counter[DUE] = min(pace, int(counter[TOUCHES]) // (2 * APPRAISALS))
        kind = (counter[NEXT] + 1) % NUM_CLASSES
        while state.newest[kind] < 0:
            kind = (kind + 1) % NUM_CLASSES
        counter[NEXT] = kind
        learn(state, kind)
