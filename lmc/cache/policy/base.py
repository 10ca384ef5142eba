"""The interface of an eviction policy.

A policy file holds plain typed functions over a NamedTuple of NumPy arrays. It knows integers only: a *node* in [0, num_nodes) stands for a
chunk, resident or remembered (ghost). The host (the directory, or the simulator's compiled kernel) owns keys, slots, pins, capacity and
time; it calls

    make_state(num_nodes, capacity, parents)
                                      once; arrays only, no Python objects, so that Numba can compile the rest. parents is the host's own
                                      array, kept in the state: parents[node] is the node of the chunk before it, or -1 for the first
                                      chunk of a chain. The host sets it before on_insert and keeps it while the node is resident;
                                      a policy reads it for resident nodes only
    on_request(state, request_class)  what is touched and inserted next is a request's of this class: a number up to MOST_CLASSES that
                                      stands for what the host was told beside the prompt, 0 for nothing. Optional; most policies ignore it
    on_hit(state, node, now)          a resident node was touched
    on_insert(state, node, now)       a node became resident (it may be a ghost of the policy)
    victim(state, holds) -> node      the node to evict next, or -1 if every resident node is held; the only place that chooses.
                                      holds[node] != 0 marks nodes that are pinned or have resident children; never return one
    on_evict(state, node)             the host evicted the node that victim() returned, or dropped any other resident node
    release(state) -> node            a ghost that the host may forget, or -1; called until -1 when a request has made its inserts. A policy
                                      without ghosts always says -1, and its nodes are forgotten when they are evicted

`now` is the number of the request: it grows from request to request and is equal for all touches of one. A request first makes room
(victim, on_evict), then inserts its new chunks, then touches those that were there, each from the last chunk to the first. So for recency
policies a parent is always younger than its child.

victim() may reorder the policy's own lists, set held nodes aside and clear marks; such changes stay whether or not the host evicts.
Asked twice in a row it names the same node. A held node costs a policy amortised constant time: see lists.py. Policies never import
Numba, torch, config or logging.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Holds = npt.NDArray[np.int32]  # (num_nodes,) pins plus resident children
MOST_CLASSES = 16  # of requests; the last number stands for all others, too
Parents = npt.NDArray[np.int32]  # (num_nodes,) the node before, or -1


@dataclass(frozen=True)
class PolicySpec:
    name: str
    summary: str
    make_state: Callable[[int, int, Parents], Any]  # Any: each policy has its own NamedTuple of arrays
    on_hit: Callable[[Any, int, int], None]
    on_insert: Callable[[Any, int, int], None]
    victim: Callable[[Any, Holds], int]
    on_evict: Callable[[Any, int], None]
    release: Callable[[Any], int]
    ghosts: float = 0.0  # remembered nodes per resident one; num_nodes must allow for them
    on_request: Callable[[Any, int], None] | None = None  # None: the policy ignores classes
    set_ghosts: Callable[[Any, int], None] | None = None  # change the number of remembered nodes of a fresh state
