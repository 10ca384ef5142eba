from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.errors import ConfigError
from lmc.sim.belady import belady_hits
from lmc.sim.policy_check import trace_of
from lmc.sim.trace import Trace
from tests.contracts.policy import Key, workloads


def naive_hits(requests: list[list[int]], capacity: int) -> list[int]:
    """Belady's rule with sets and sorting."""
    there: set[Key] = set()
    hits = []
    for index, labels in enumerate(requests):
        chain = [tuple(labels[: depth + 1]) for depth in range(len(labels))]
        found = 0
        while found < len(chain) and chain[found] in there:
            found += 1
        hits.append(found)
        there.update(chain)

        def next_use(key: Key, after: int = index) -> tuple[int, int]:
            coming = (other for other in range(after + 1, len(requests)) if tuple(requests[other][: len(key)]) == key)
            return next(coming, len(requests)), len(key)

        there = set(sorted(there, key=next_use)[:capacity])
    return hits


def best_hits(requests: list[list[int]], capacity: int) -> int:
    """The most hits of any prefix-closed content at all, by trying everything."""
    best: dict[frozenset[Key], int] = {frozenset(): 0}
    for labels in requests:
        chain = [tuple(labels[: depth + 1]) for depth in range(len(labels))]
        after: dict[frozenset[Key], int] = {}
        for content, hits in best.items():
            found = 0
            while found < len(chain) and chain[found] in content:
                found += 1
            pool = content | set(chain)
            for kept in combinations(sorted(pool), min(capacity, len(pool))):
                left = frozenset(kept)
                after[left] = max(after.get(left, 0), hits + found)
        best = after
    return max(best.values())


@settings(max_examples=300, deadline=None)
@given(workloads(), st.integers(1, 14))
def test_hits_equal_a_naive_simulator(requests: list[list[int]], capacity: int) -> None:
    trace, _ = trace_of(requests)
    [result] = belady_hits(trace, [capacity], workers=1)
    assert result.request_hits.tolist() == naive_hits(requests, capacity)


@settings(max_examples=60, deadline=None)
@given(workloads(max_requests=7, max_length=3), st.integers(1, 3))
def test_nothing_is_better(requests: list[list[int]], capacity: int) -> None:
    trace, _ = trace_of(requests)
    [result] = belady_hits(trace, [capacity], workers=1)
    assert result.hit_blocks(trace) == best_hits(requests, capacity)


def test_capacities_run_in_parallel_and_keep_their_order() -> None:
    trace, _ = trace_of([[1, 2, 3], [4, 5], [1, 2, 3], [4, 5]])
    results = belady_hits(trace, [5, 1, 3])
    assert [(result.capacity, result.hit_blocks(trace)) for result in results] == [(5, 5), (1, 1), (3, 3)]


def test_bad_capacity_is_refused() -> None:
    trace: Trace = trace_of([[1]])[0]
    with pytest.raises(ConfigError, match="at least one trace block, not 0"):
        belady_hits(trace, [0])
