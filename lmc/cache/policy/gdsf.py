"""GDSF (Cherkasova 1998), which knows what a chunk costs: it evicts the chunk with the least value = clock + touches * cost / size.

Chunks have one size. A chunk costs the time to recompute it, which grows with its position in the chain because attention reads all
chunks before it. The clock is the value of the last victim; it ages what is no longer touched. A parent is worth at least as much as any
child, because it cannot go before it. A binary heap holds the chunks by the values that they had when they were last looked at. Values only
grow, so the first chunk is brought up to date until it stays the first: a touch is O(1), an eviction amortised O(log n) for each touch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmc.cache.policy.base import Holds, Parents, PolicySpec
from lmc.cache.policy.lists import Int32

ATTENTION_DEPTH = (
    128  # position at which attention costs as much as the rest: about 32k tokens of a 7-8B model in chunks of 256
)


class Heap(NamedTuple):
    nodes: Int32  # (num_nodes,) the least valuable first
    value: npt.NDArray[np.float64]  # (num_nodes,) by index, as it was when the heap last looked
    touched: npt.NDArray[np.int64]  # (num_nodes,) as State's, likewise
    place: Int32  # (num_nodes,) index of a node, -1 outside
    size: Int32  # (1,)


class State(NamedTuple):
    parents: Parents
    heap: Heap
    value: npt.NDArray[np.float64]  # (num_nodes,)
    least: npt.NDArray[np.float64]  # (num_nodes,) value of the best child so far
    touched: npt.NDArray[np.int64]  # (num_nodes,) order of touches, older goes first among equals
    touches: Int32  # (num_nodes,) since it was stored
    depth: Int32  # (num_nodes,) chunks up to and with this one, 0 if not known
    clock: npt.NDArray[np.float64]  # (1,)
    total: npt.NDArray[np.int64]  # (1,) touches of all nodes so far
    held: Int32  # (num_nodes,) held nodes that a search took out


def make_state(num_nodes: int, capacity: int, parents: Parents) -> State:
    return State(
        parents=parents,
        heap=Heap(
            nodes=np.zeros(num_nodes, dtype=np.int32),
            value=np.zeros(num_nodes, dtype=np.float64),
            touched=np.zeros(num_nodes, dtype=np.int64),
            place=np.full(num_nodes, -1, dtype=np.int32),
            size=np.zeros(1, dtype=np.int32),
        ),
        value=np.zeros(num_nodes, dtype=np.float64),
        least=np.zeros(num_nodes, dtype=np.float64),
        touched=np.zeros(num_nodes, dtype=np.int64),
        touches=np.zeros(num_nodes, dtype=np.int32),
        depth=np.zeros(num_nodes, dtype=np.int32),
        clock=np.zeros(1, dtype=np.float64),
        total=np.zeros(1, dtype=np.int64),
        held=np.zeros(num_nodes, dtype=np.int32),
    )


def measure_depth(parents: Parents, depth: Int32, node: int) -> None:
    """Walk up to the first ancestor of known depth, and record the depth of every node on the way. So each node is walked once."""
    steps = 0
    above = node
    while above >= 0 and depth[above] == 0:
        steps += 1
        above = parents[above]
    deep = steps if above < 0 else steps + depth[above]
    while steps > 0:
        depth[node] = deep
        node = parents[node]
        deep -= 1
        steps -= 1


def place_up(heap: Heap, index: int, node: int, value: float, touched: int) -> int:
    """Put a node at index in the heap, or further up while the node above it goes later. Returns the final index."""
    while index > 0:
        above = (index - 1) // 2
        if heap.value[above] < value or (heap.value[above] == value and heap.touched[above] < touched):
            break
        move(heap, above, index)
        index = above
    put(heap, index, node, value, touched)
    return index


def place_down(heap: Heap, index: int, node: int, value: float, touched: int) -> None:
    """Put a node at index in the heap, or further down while a node below it goes first."""
    size = heap.size[0]
    while 2 * index + 1 < size:
        below = 2 * index + 1
        least, when = heap.value[below], heap.touched[below]
        if below + 1 < size:
            other = heap.value[below + 1]
            if other < least or (other == least and heap.touched[below + 1] < when):
                below += 1
                least, when = other, heap.touched[below]
        if value < least or (value == least and touched < when):
            break
        move(heap, below, index)
        index = below
    put(heap, index, node, value, touched)


def put(heap: Heap, index: int, node: int, value: float, touched: int) -> None:
    heap.nodes[index] = node
    heap.value[index] = value
    heap.touched[index] = touched
    heap.place[node] = index


def move(heap: Heap, source: int, index: int) -> None:
    put(heap, index, heap.nodes[source], heap.value[source], heap.touched[source])


def push(heap: Heap, node: int, value: float, touched: int) -> None:
    heap.size[0] += 1
    place_up(heap, heap.size[0] - 1, node, value, touched)


def remove(heap: Heap, node: int) -> None:
    index = heap.place[node]
    heap.place[node] = -1
    heap.size[0] -= 1
    last = heap.size[0]
    if index == last:
        return
    moved, value, touched = heap.nodes[last], heap.value[last], heap.touched[last]
    place_down(heap, place_up(heap, index, moved, value, touched), moved, value, touched)


def on_hit(state: State, node: int, now: int) -> None:
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


def on_insert(state: State, node: int, now: int) -> None:
    measure_depth(state.parents, state.depth, node)
    state.touches[node] = 0
    on_hit(state, node, now)
    push(state.heap, node, state.value[node], state.touched[node])


def victim(state: State, holds: Holds) -> int:
    heap = state.heap
    held = 0
    while heap.size[0] > 0:
        node = heap.nodes[0]
        if heap.touched[0] != state.touched[node]:
            place_down(heap, 0, node, state.value[node], state.touched[node])
        elif holds[node] != 0:
            state.held[held] = node
            held += 1
            remove(heap, node)
        else:
            break
    node = heap.nodes[0] if heap.size[0] > 0 else -1
    for index in range(held):
        push(heap, state.held[index], state.value[state.held[index]], state.touched[state.held[index]])
    return node


def on_evict(state: State, node: int) -> None:
    state.clock[0] = max(state.clock[0], state.value[node])
    remove(state.heap, node)
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
