from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.policy import POLICIES, predictive
from lmc.cache.policy.reuse import NUM_BINS, appraise, count, make_life
from tests.contracts.policy import Host, NodePolicy, run_spec, workloads

SPEC = predictive.SPEC


def test_before_anything_is_learned_the_oldest_goes_first() -> None:
    host = run_spec(SPEC, [[label] for label in range(9)], 6)
    assert host.victims == [(0,), (1,), (2,)]


def test_chunks_that_never_return_make_room_for_those_that_do() -> None:
    """Twelve chats take turns, and between two turns pass requests that nobody repeats: LRU never keeps a chat until its next turn."""
    requests: list[list[int]] = []
    for turn in range(40 * 12):
        requests.append([100 + turn % 12, 0, 1])
        requests.extend([[1000 + 3 * turn + index, 2] for index in range(3)])
    hits = {name: sum(run_spec(POLICIES[name], requests, 50).hits) for name in ("lru", "predictive")}
    assert hits["lru"] == 0
    assert hits["predictive"] > 0.8 * 3 * 12 * 39


@settings(max_examples=30, deadline=None)
@given(workloads(), st.integers(1, 14))
def test_the_tree_knows_every_list_and_the_edges_every_age(requests: list[list[int]], capacity: int) -> None:
    policy = NodePolicy(SPEC, capacity, max(map(len, requests)))
    host = Host(policy, capacity)
    for labels in requests:
        host.request(labels)
        state = policy.state
        tree = state.tree
        for place in range(1, predictive.LEAVES):
            assert tree[place] == min(tree[2 * place], tree[2 * place + 1])
        filled = {}
        for key in host.there:
            node = policy.node_of[key]
            age = state.counter[predictive.NOW] - state.last[node]
            assert state.life.lower[state.bins[node]] <= age < state.life.lower[state.bins[node] + 1]
            if not state.chains.aside[node]:
                filled[int(predictive.list_of(state, node))] = True
        for number in range(predictive.NUM_LISTS):
            expected = state.life.value[number] if number in filled else predictive.EMPTY
            assert tree[predictive.LEAVES + number] == expected


def test_value_is_the_chance_of_a_hit_within_the_horizon() -> None:
    """Of 1,000 touches 300 are repeated at once; the others live on to bin 8 without another touch."""
    life = make_life(2)
    for k in range(9):
        count(life.reached, 0, k, 1000 if k == 0 else 700)
    count(life.reused, 0, 0, 300)
    appraise(life, 0, horizon=4.0, chunks=0.001, earning=0.0)
    assert life.value[0] == pytest.approx(0.3 / 4, rel=1e-3)
    assert life.value[4] == pytest.approx(0.0, abs=1e-3)


def test_worthless_chunks_go_by_age() -> None:
    life = make_life(2)
    for k in range(NUM_BINS):
        count(life.reached, 0, k, 100_000)
    appraise(life, 0, horizon=100.0, chunks=1.0, earning=1.0)
    values = life.value[:NUM_BINS]
    assert (np.diff(values) < 0).all()


def test_a_class_without_history_leans_on_the_others() -> None:
    life = make_life(2)
    count(life.reached, 0, 0, 100_000)
    count(life.reused, 0, 0, 90_000)
    appraise(life, 1, horizon=1.0, chunks=1.0, earning=0.0)
    assert life.value[NUM_BINS] == pytest.approx(0.9, abs=0.01)
