"""GDSF-style cost-aware eviction (Cherkasova 1998): evict the chunk with the least value = clock + touches * cost / size.

Chunks have one size. A chunk costs the time to recompute it, which grows with its position in the chain because attention reads all
chunks before it. The clock is the value of the last victim; it ages what is no longer touched. A parent is worth at least as much as any
child, because it cannot go before it. The values are in a binary heap: O(log n) an operation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmc.cache.policy.base import Blocked, Parents, PolicySpec
from lmc.cache.policy.lists import Int32

ATTENTION_DEPTH = (
    128  # position at which attention costs as much as the rest: about 32k tokens of a 7-8B model in chunks of 256
)


class State(NamedTuple):
    parents: Parents
    heap: Int32  # (num_nodes,) nodes, the least valuable first
    place: Int32  # (num_nodes,) index in the heap, -1 outside
    size: Int32  # (1,) nodes in the heap
    value: npt.NDArray[np.float64]  # (num_nodes,)
    least: npt.NDArray[np.float64]  # (num_nodes,) value of the best child so far
    touched: npt.NDArray[np.int64]  # (num_nodes,) order of touches, older goes first among equals
    touches: Int32  # (num_nodes,) since it was stored
    depth: Int32  # (num_nodes,) chunks up to and with this one, 0 if not known
    clock: npt.NDArray[np.float64]  # (1,)
    total: npt.NDArray[np.int64]  # (1,) touches of all nodes so far
    held: Int32  # (num_nodes,) blocked nodes that a search took out


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    return State(
        parents=parents,
        heap=np.zeros(num_nodes, dtype=np.int32),
        place=np.full(num_nodes, -1, dtype=np.int32),
        size=np.zeros(1, dtype=np.int32),
        value=np.zeros(num_nodes, dtype=np.float64),
        least=np.zeros(num_nodes, dtype=np.float64),
        touched=np.zeros(num_nodes, dtype=np.int64),
        touches=np.zeros(num_nodes, dtype=np.int32),
        depth=np.zeros(num_nodes, dtype=np.int32),
        clock=np.zeros(1, dtype=np.float64),
        total=np.zeros(1, dtype=np.int64),
        held=np.zeros(num_nodes, dtype=np.int32),
    )


def measure_depth(state: State, node: int) -> None:
    """Walk up to the first ancestor of known depth and note the depth of all on the way, so that each is walked once."""
    steps = 0
    above = node
    while above >= 0 and state.depth[above] == 0:
        steps += 1
        above = state.parents[above]
    depth = steps if above < 0 else steps + state.depth[above]
    while steps > 0:
        state.depth[node] = depth
        node = state.parents[node]
        depth -= 1
        steps -= 1


def goes_first(state: State, node: int, other: int) -> bool:
    if state.value[node] != state.value[other]:
        return bool(state.value[node] < state.value[other])
    return bool(state.touched[node] < state.touched[other])


def put(state: State, index: int, node: int) -> None:
    state.heap[index] = node
    state.place[node] = index


def sift_up(state: State, index: int) -> None:
    node = state.heap[index]
    while index > 0:
        above = (index - 1) // 2
        if not goes_first(state, node, state.heap[above]):
            break
        put(state, index, state.heap[above])
        index = above
    put(state, index, node)


def sift_down(state: State, index: int) -> None:
    node = state.heap[index]
    size = state.size[0]
    while 2 * index + 1 < size:
        below = 2 * index + 1
        if below + 1 < size and goes_first(state, state.heap[below + 1], state.heap[below]):
            below += 1
        if not goes_first(state, state.heap[below], node):
            break
        put(state, index, state.heap[below])
        index = below
    put(state, index, node)


def push(state: State, node: int) -> None:
    put(state, state.size[0], node)
    state.size[0] += 1
    sift_up(state, state.size[0] - 1)


def remove(state: State, node: int) -> None:
    index = state.place[node]
    state.place[node] = -1
    state.size[0] -= 1
    if index == state.size[0]:
        return
    moved = state.heap[state.size[0]]
    put(state, index, moved)
    sift_up(state, index)
    sift_down(state, state.place[moved])


def appraise(state: State, node: int) -> None:
    """Set the node's value and order for one more touch, and tell its parent, which is touched next."""
    state.touches[node] += 1
    state.total[0] += 1
    state.touched[node] = state.total[0]
    cost = 1.0 + state.depth[node] / ATTENTION_DEPTH
    value = max(state.clock[0] + state.touches[node] * cost, state.least[node])
    state.value[node] = value
    parent = state.parents[node]
    if parent >= 0 and state.least[parent] < value:
        state.least[parent] = value


def on_hit(state: State, node: int, now: int) -> None:
    appraise(state, node)
    sift_up(state, state.place[node])
    sift_down(state, state.place[node])


def on_insert(state: State, node: int, now: int) -> None:
    measure_depth(state, node)
    state.touches[node] = 0
    appraise(state, node)
    push(state, node)


def victim(state: State, blocked: Blocked) -> int:
    held = 0
    while state.size[0] > 0 and blocked[state.heap[0]] != 0:
        state.held[held] = state.heap[0]
        held += 1
        remove(state, state.heap[0])
    node = state.heap[0] if state.size[0] > 0 else -1
    for index in range(held):
        push(state, state.held[index])
    return node


def on_evict(state: State, node: int) -> None:
    state.clock[0] = max(state.clock[0], state.value[node])
    remove(state, node)
    state.depth[node] = 0
    state.least[node] = 0.0


def release(state: State) -> int:
    return -1


SPEC = PolicySpec(
    "gdsf",
    "touches times recompute cost, aged",
    make_state,
    on_hit,
    on_insert,
    victim,
    on_evict,
    release,
)
