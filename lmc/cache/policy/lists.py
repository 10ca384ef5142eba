"""Building blocks of most policies: linked lists in arrays, and the chain rule, by which children are evicted before their parents.

Several lists share one pair of arrays, so a node is in at most one of them. List k has its head at index size - 1 - k, behind the nodes.

The chain rule at constant cost: a node with resident children that the search for a victim meets is *set aside*, out of its list, until its
last child is gone; then its policy puts it back at the end where it was met. So each node is set aside at most once per child, and a long
chain is never walked twice. Nodes that are held only by a pin are few and passing; the search steps over them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lmc.cache.policy.base import Holds, Parents

Int32 = npt.NDArray[np.int32]
Marks = npt.NDArray[np.uint8]


class Lists(NamedTuple):
    older: Int32  # (num_nodes + num_lists,) older[head] is the youngest node of the list
    younger: Int32  # (num_nodes + num_lists,) younger[head] is the oldest


class Chains(NamedTuple):
    parents: Parents  # (num_nodes,) the host's array
    children: Int32  # (num_nodes,) resident children
    aside: Marks  # (num_nodes,) 1: out of its list until the last child goes


class Placed(Protocol):
    """The state of a policy that keeps each node in one of several numbered places, each with a list of its own."""

    @property
    def queues(self) -> Lists: ...
    @property
    def where(self) -> Marks: ...  # (num_nodes,) place
    @property
    def size(self) -> Int32: ...  # (num_places,) nodes, those aside too


def make_lists(num_nodes: int, num_lists: int) -> Lists:
    heads = np.arange(num_nodes + num_lists, dtype=np.int32)
    return Lists(heads, heads.copy())


def make_chains(num_nodes: int, parents: Parents) -> Chains:
    return Chains(parents, np.zeros(num_nodes, dtype=np.int32), np.zeros(num_nodes, dtype=np.uint8))


def put_before(lists: Lists, at: int, node: int) -> None:
    """Place node next to `at`, on its older side; at a head, that makes it the youngest of the list."""
    older = lists.older[at]
    lists.older[node] = older
    lists.younger[node] = at
    lists.younger[older] = node
    lists.older[at] = node


def put_oldest(lists: Lists, head: int, node: int) -> None:
    put_before(lists, lists.younger[head], node)


def head_of(lists: Lists, number: int) -> int:
    return lists.older.size - 1 - int(number)


def put(state: Placed, place: int, node: int) -> None:
    """Put node at the young end of the list of its new place."""
    state.where[node] = place
    state.size[place] += 1
    put_before(state.queues, head_of(state.queues, place), node)


def unlink(lists: Lists, node: int) -> None:
    older, younger = lists.older[node], lists.younger[node]
    lists.younger[older] = younger
    lists.older[younger] = older


def take_out(lists: Lists, chains: Chains, node: int) -> None:
    """Take node out of its list, or end its being set aside."""
    if chains.aside[node]:
        chains.aside[node] = 0
    else:
        unlink(lists, node)


def set_aside(lists: Lists, chains: Chains, node: int) -> None:
    unlink(lists, node)
    chains.aside[node] = 1


def oldest_free(lists: Lists, head: int, chains: Chains, holds: Holds) -> int:
    """Return the oldest node of a list that may be evicted, or -1. Older nodes that have resident children are set aside."""
    node = lists.younger[head]
    while node != head and holds[node] != 0:
        following = lists.younger[node]
        if chains.children[node] > 0:
            set_aside(lists, chains, node)
        node = following
    return -1 if node == head else node


def add_child(chains: Chains, node: int) -> None:
    """Record that node became resident: its parent has one more resident child."""
    parent = chains.parents[node]
    if parent >= 0:
        chains.children[parent] += 1


def drop_child(chains: Chains, node: int) -> int:
    """Record that node is not resident any more. Returns its parent if that was set aside and must return, else -1."""
    parent = chains.parents[node]
    if parent < 0:
        return -1
    chains.children[parent] -= 1
    if chains.children[parent] > 0 or not chains.aside[parent]:
        return -1
    chains.aside[parent] = 0
    return int(parent)
