from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.policy import POLICIES, get_policy
from lmc.errors import ConfigError
from tests.cache.policy.naive import NAIVE
from tests.contracts.policy import Host, NodePolicy, flat_workloads, run_policy, run_spec, workloads

names = pytest.mark.parametrize("name", sorted(POLICIES))


@pytest.mark.parametrize("name", sorted(NAIVE))
@settings(max_examples=60, deadline=None)
@given(workloads(), st.integers(1, 14))
def test_victims_equal_those_of_a_naive_twin(name: str, requests: list[list[int]], capacity: int) -> None:
    host = run_spec(POLICIES[name], requests, capacity)
    twin = run_policy(NAIVE[name](capacity), requests, capacity)
    assert host.victims == twin.victims
    assert host.hits == twin.hits


@pytest.mark.parametrize("name", sorted(NAIVE))
@settings(max_examples=60, deadline=None)
@given(flat_workloads, st.integers(1, 11))
def test_victims_equal_those_of_a_naive_twin_without_chains(
    name: str, requests: list[list[int]], capacity: int
) -> None:
    assert (
        run_spec(POLICIES[name], requests, capacity).victims
        == run_policy(NAIVE[name](capacity), requests, capacity).victims
    )


@names
@settings(max_examples=60, deadline=None)
@given(workloads(), st.integers(1, 14), st.data())
def test_pinned_nodes_and_parents_stay_and_drops_are_survived(
    name: str, requests: list[list[int]], capacity: int, data: st.DataObject
) -> None:
    """The host checks each answer; here it also pins at random and drops leaves that no policy chose."""
    spec = POLICIES[name]
    host = Host(NodePolicy(spec, capacity, max(map(len, requests))), capacity)
    pinned: list[tuple[int, ...]] = []
    for labels in requests:
        host.request(labels)
        if pinned and data.draw(st.booleans()):
            host.pins[pinned.pop()] -= 1
        if host.there and data.draw(st.booleans()):
            key = data.draw(st.sampled_from(sorted(host.there)))
            host.pins[key] += 1
            pinned.append(key)
        leaves = sorted(key for key in host.there if not host.held(key))
        if leaves and data.draw(st.integers(0, 3)) == 0:
            host.drop(data.draw(st.sampled_from(leaves)))


@names
def test_all_blocked_means_no_victim(name: str) -> None:
    spec = POLICIES[name]
    parents = np.full(8, -1, dtype=np.int32)
    state = spec.make_state(8, 4, parents)
    assert spec.victim(state, np.zeros(8, dtype=np.int32)) == -1
    for node in range(4):
        spec.on_insert(state, node, node + 1)
    assert spec.victim(state, np.ones(8, dtype=np.int32)) == -1
    assert spec.victim(state, np.zeros(8, dtype=np.int32)) in range(4)


@names
def test_a_long_chain_behind_its_leaf_is_walked_once(name: str) -> None:
    """Growing one chain block by block puts the leaf behind its parents in every queue; evicting it all must not be quadratic."""
    length = 300
    spec = POLICIES[name]
    state = spec.make_state(length, length, np.arange(-1, length - 1, dtype=np.int32))
    reads = CountingArray(np.zeros(length, dtype=np.int32))
    for node in range(length):
        spec.on_insert(state, node, node + 1)
        for parent in range(node - 1, -1, -1):
            spec.on_hit(state, parent, node + 1)
            reads.array[parent] = 1
    for node in range(length - 1, -1, -1):
        reads.array[node] = 0
        assert spec.victim(state, reads) == node
        spec.on_evict(state, node)
    assert reads.count < 10 * length


class CountingArray:
    """`held`, counting how often a policy looks."""

    def __init__(self, array: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        self.array = array
        self.count = 0

    def __getitem__(self, node: int) -> int:
        self.count += 1
        return int(self.array[node])


def test_unknown_policy_lists_the_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown eviction policy 'mru'; there are 2q, arc, fifo"):
        get_policy("mru")


def nbytes(state: Any) -> int:
    return state.nbytes if isinstance(state, np.ndarray) else sum(map(nbytes, state))


def test_the_state_takes_the_bytes_that_the_docs_say() -> None:
    num_nodes = 1_000_000
    parents = np.full(num_nodes, -1, dtype=np.int32)
    taken = {
        name: round(nbytes(spec.make_state(num_nodes, num_nodes // 10, parents)) / num_nodes)
        for name, spec in POLICIES.items()
    }
    text = (Path(__file__).parents[3] / "docs" / "simulating.md").read_text()
    (said,) = re.findall(r"at a tenth of the unique blocks: (.*?)\. ", text, re.DOTALL)
    found = {
        name: int(number)
        for names, number in re.findall(r"((?:`[\w-]+`(?:, | and )?)+) (\d+)", " ".join(said.split()))
        for name in re.findall(r"`([\w-]+)`", names)
    }
    assert found == taken
