"""Predictive evicts the chunk that is expected to bring the fewest hits for its stay. It learns this from what happened to similar chunks.

At each touch a chunk falls into a class. Chunks that more requests used than its conversation has turns are *shared*: their class is how
often they were touched and how long before. All others follow the fate of their request: their class is its turn, how many new chunks it
brings, and whether the chunk is its last, which the next turn may complete to another one. When a request leaves the path of another
between two chunks that were touched equally often so far, a conversation went back and on from there: what the other touched beyond is
*overtaken*, a class of its own, and begins to age anew. reuse.py learns what becomes of a class by age; ghosts, four for each place, tell
it of mistakes. Nothing is set per workload.

Chunks of one class that one request touched form a *group* and age together. Groups of one class and age bin share a list, oldest first; a
tournament tree holds the value of each list, and the victim is the oldest chunk of the list with the least. A touch is amortised O(1) but
for the tree, whose depth is fixed; a group crosses an age bin, at most some dozens in a life, in O(1).
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
    unlink,
)
from lmc.cache.policy.reuse import NUM_BINS, Int64, Life, appraise, count, make_life
from lmc.cache.policy.tournament import EMPTY, Float64, least_leaf, make_tree, set_leaf

NOWHERE, RESIDENT, GHOST = range(3)
GHOSTS = 4  # for each place
STEPS = 4  # each feature of a class has so many values
BODY, LAST, SHARED, OVERTAKEN = 0, STEPS**2, 2 * STEPS**2, 3 * STEPS**2  # the first class of each kind
NUM_CLASSES = OVERTAKEN + 1
NUM_LISTS = NUM_CLASSES * NUM_BINS
LEAVES = 2048  # of the tree: a power of two, at least NUM_LISTS
MOST = 250  # touches and turns are counted up to here
SMOOTH = 0.01  # weight of the newest request in the mean
APPRAISALS = 192  # while the cache is touched through, but 64 touches apart or more

# Entries of State.counter
NOW, LENGTH, TURN, KIND, TOUCHES, DUE, NEXT, NUM_GHOSTS, CAPACITY, FREE, LOWEST, LEFT = range(12)


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
    counter = np.zeros(12, dtype=np.int64)
    counter[LEFT] = -1
    counter[CAPACITY] = capacity
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


# Touches


def step(amount: int, base: int) -> int:
    """Return 0 for a count below base, and one more for each further power of base; the result is below STEPS."""
    result = 0
    while amount >= base and result < STEPS - 1:
        amount //= base
        result += 1
    return result


def left_by(state: State, node: int, following: int) -> int:
    """Return the chunk after node on the path that the current request leaves at node, or -1. On its own path, `following` comes next."""
    child = int(state.child[node])
    if child < 0 or child == following or state.where[child] == NOWHERE:
        return -1
    group = state.group[child]
    together = state.last[group] == state.last[state.group[node]] and state.kind[group] != OVERTAKEN
    alike = state.uses[child] == state.uses[node] and state.uses[node] < MOST
    return child if together and alike else -1


def begin_request(state: State, node: int, now: int) -> None:
    """Begin a request whose last chunk is node: find where its new chunks begin and whose path it leaves there, and let time pass."""
    counter = state.counter
    if counter[NOW] > 0:
        overtake(state)
        end_request(state)
    counter[NOW] = now
    counter[LENGTH] = 0
    state.child[node] = -1
    new = 0
    following = -1
    while node >= 0 and state.where[node] != RESIDENT:
        new += 1
        following = node
        node = state.chains.parents[node]
    counter[LEFT] = left_by(state, node, following) if node >= 0 else -1
    # The turn before touched its new chunks once. What was touched more often is the beginning of many conversations.
    turn = min(int(state.turns[node]) + 1, MOST) if node >= 0 and state.uses[node] == 0 else 0
    counter[TURN] = turn
    counter[KIND] = LAST + step(turn, 2) * STEPS + step(new, 4)
    pass_time(state)


def start_life(state: State, node: int, uses: int, bin_: int) -> None:
    """Put a touched node into its class as the youngest. uses is the number of touches before this one, bin_ the age at which it came."""
    counter, members = state.counter, state.members
    turn = counter[TURN]
    if uses > turn:
        kind = SHARED + min(bin_ // 10, STEPS - 1) * STEPS + min(uses - 1, STEPS - 1)
    else:
        kind = int(counter[KIND])
    if counter[LENGTH] == 0:
        counter[KIND] += BODY - LAST
    counter[LENGTH] += 1
    group = int(state.newest[kind])
    if group < 0 or state.last[group] != counter[NOW] or state.kind[group] != kind or state.size[group] == 0:
        group = open_group(state, kind)
    if is_empty(members, group):
        show_group(state, group)
    put_before(members, head_of(members, group), node)
    state.size[group] += 1
    state.group[node] = group
    state.uses[node] = uses
    state.turns[node] = turn
    parent = state.chains.parents[node]
    if parent >= 0:
        state.child[parent] = node


def touch_again(state: State, node: int) -> None:
    """Move a touched node, resident or a ghost, from its group to a group of the current request."""
    group = int(state.group[node])
    bin_ = int(state.bins[group])
    count(state.life.reused, state.kind[group], bin_, 1)
    shrink(state, group)
    start_life(state, node, min(int(state.uses[node]) + 1, MOST), bin_)


def on_hit(state: State, node: int, now: int) -> None:
    if state.counter[NOW] != now:
        begin_request(state, node, now)
    take_member(state, node)
    touch_again(state, node)


def on_insert(state: State, node: int, now: int) -> None:
    if state.counter[NOW] != now:
        begin_request(state, node, now)
    ghost = state.where[node] == GHOST
    state.where[node] = RESIDENT
    if ghost:
        unlink(state.members, node)
        state.counter[NUM_GHOSTS] -= 1
        touch_again(state, node)
    else:
        start_life(state, node, 0, 0)
    add_child(state.chains, node)


# Eviction


def oldest_of(state: State, number: int, holds: Holds) -> int:
    """Return the oldest node of a list that may be evicted, or -1. Groups whose nodes are all set aside leave the list."""
    head = head_of(state.lists, number)
    group = state.lists.younger[head]
    node = -1
    while node < 0 and group != head:
        following = state.lists.younger[group]
        node = oldest_free(state.members, head_of(state.members, group), state.chains, holds)
        if is_empty(state.members, group):
            unlink(state.lists, group)
        group = following
    return node


def victim(state: State, holds: Holds) -> int:
    overtake(state)
    tree, counter = state.tree, state.counter
    num_held = 0
    node = -1
    while node < 0 and tree[1] != EMPTY:
        number = least_leaf(tree, int(counter[LOWEST]))
        counter[LOWEST] = number
        node = oldest_of(state, number, holds)
        if node < 0:
            state.held[num_held] = number
            num_held += 1
            set_leaf(tree, number, EMPTY)
    for index in range(num_held):
        show(state.lists, tree, state.life.value, state.held[index])
    return node


def on_evict(state: State, node: int) -> None:
    take_member(state, node)
    state.where[node] = GHOST
    state.counter[NUM_GHOSTS] += 1
    members = state.members
    put_before(members, ghosts_of(state), node)
    parent = drop_child(state.chains, node)
    if parent >= 0:
        group = int(state.group[parent])
        if is_empty(members, group):
            number = list_of(state, group)
            put_oldest(state.lists, head_of(state.lists, number), group)
            show(state.lists, state.tree, state.life.value, number)
        put_oldest(members, head_of(members, group), parent)


def release(state: State) -> int:
    if state.counter[NUM_GHOSTS] <= GHOSTS * state.counter[CAPACITY]:
        return -1
    members = state.members
    node = members.younger[ghosts_of(state)]
    unlink(members, node)
    state.counter[NUM_GHOSTS] -= 1
    state.where[node] = NOWHERE
    shrink(state, state.group[node])
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
