"""Predictive evicts the chunk that is expected to bring the fewest hits for its stay. It learns this from what happened to similar chunks.

At each touch a chunk falls into a class. Chunks that more requests used than its conversation has turns are *shared*: their class is how
often they were touched and how long before. All others follow the fate of their request: their class is its turn, how many new chunks it
brings, and whether the chunk is its last, which the next turn may complete to another one. Where the host was told the class of the
request, that takes the place of the turn. When a request leaves the path of another
between two chunks that were touched equally often so far, a conversation went back and on from there: what the other touched beyond is
*overtaken*, a class of its own, and begins to age anew. reuse.py learns what becomes of a class by age; ghosts, four for each place, tell
it of mistakes. Nothing is set per workload.

Chunks of one class that one request touched form a *group* and age together. Groups of one class and age bin share a list, oldest first; a
tournament tree holds the value of each list, and the victim is the oldest chunk of the list with the least. A touch is amortised O(1) but
for the tree, whose depth is fixed; a group crosses an age bin, at most some dozens in a life, in O(1).
"""

from __future__ import annotations

from lmc.cache.policy.base import Holds, PolicySpec
from lmc.cache.policy.lists import add_child, drop_child, head_of, oldest_free, put_before, put_oldest, unlink
from lmc.cache.policy.predictive_groups import (
    BODY,
    GHOST,
    GHOSTS,
    KIND,
    LAST,
    LEFT,
    LENGTH,
    LOWEST,
    MOST,
    MOST_GHOSTS,
    NOW,
    NOWHERE,
    NUM_GHOSTS,
    OVERTAKEN,
    REQUEST_CLASS,
    RESIDENT,
    SHARED,
    STEPS,
    TOLD_LAST,
    TURN,
    State,
    end_request,
    ghosts_of,
    is_empty,
    list_of,
    make_state,
    open_group,
    overtake,
    pass_time,
    show,
    show_group,
    shrink,
    take_member,
)
from lmc.cache.policy.reuse import count
from lmc.cache.policy.tournament import EMPTY, least_leaf, set_leaf

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
    told = int(counter[REQUEST_CLASS])
    if told > 0:
        counter[KIND] = TOLD_LAST + min(told - 1, STEPS - 1) * STEPS + step(new, 4)
    else:
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


def on_request(state: State, request_class: int) -> None:
    state.counter[REQUEST_CLASS] = request_class


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
    if state.counter[NUM_GHOSTS] <= state.counter[MOST_GHOSTS]:
        return -1
    members = state.members
    node = members.younger[ghosts_of(state)]
    unlink(members, node)
    state.counter[NUM_GHOSTS] -= 1
    state.where[node] = NOWHERE
    shrink(state, state.group[node])
    return int(node)


def set_ghosts(state: State, ghosts: int) -> None:
    state.counter[MOST_GHOSTS] = ghosts


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
    on_request=on_request,
    set_ghosts=set_ghosts,
)
