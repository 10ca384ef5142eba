from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings

from lmc.sim import stack
from lmc.sim.build import TraceBuilder
from lmc.sim.trace import Trace
from tests.sim.chained_traces import chain_of, naive_lru, tokens_of, traces


@settings(max_examples=1000, deadline=None)
@given(traces())
def test_hits_equal_a_naive_simulator_at_every_capacity(trace: Trace) -> None:
    profile = stack.profile(trace)
    every, second_half = stack.hit_curve(profile), stack.hit_curve(profile, "last-half")
    half = trace.num_requests // 2
    for capacity in range(trace.num_unique + 2):
        hits = naive_lru(trace, capacity)
        tokens = [tokens_of(trace, request, found) for request, found in enumerate(hits)]
        assert every.at(capacity) == (sum(hits), sum(tokens))
        assert second_half.at(capacity) == (sum(hits[half:]), sum(tokens[half:]))
        assert stack.request_hits(profile, capacity).tolist() == hits
    assert every.at(math.inf) == every.at(trace.num_unique)
    assert every.total_blocks == trace.num_blocks
    assert second_half.total_tokens == trace.input_tokens[half:].sum()


@settings(max_examples=200, deadline=None)
@given(traces())
def test_sliding_ttl_hits_equal_a_naive_simulator(trace: Trace) -> None:
    profile = stack.profile(trace)
    for capacity in (1, 3, trace.num_unique):
        for ttl_s in (0.0, 1.0, 4.0):
            assert stack.request_hits(profile, capacity, ttl_s).tolist() == naive_lru(trace, capacity, ttl_s)


@settings(max_examples=100, deadline=None)
@given(traces(max_requests=6))
def test_segments_cover_exactly_the_blocks_seen_before(trace: Trace) -> None:
    profile = stack.profile(trace)
    seen: set[int] = set()
    for request in range(trace.num_requests):
        chain = chain_of(trace, request)
        rows = profile.request == request
        assert profile.length[rows].sum() == sum(block in seen for block in chain)
        assert (profile.previous[rows] < request).all()
        seen.update(chain)


def test_many_live_requests_keep_exact_ranks() -> None:
    """More than 4,096 live requests, so that the tree of slots is rebuilt and grows."""
    builder = TraceBuilder("wide", "test", 1)
    generator = np.random.default_rng(7)
    picks = generator.integers(0, 9000, size=40_000).tolist()
    for number, pick in enumerate(picks):
        builder.add(number + 1, [pick], 0.0, 1, 0)
    trace = builder.finish()
    curve = stack.hit_curve(stack.profile(trace))
    for capacity in (1, 500, 4096, 8000, 9000):
        assert curve.at(capacity)[0] == sum(naive_lru(trace, capacity))


def test_a_request_longer_than_the_cache_keeps_its_first_blocks() -> None:
    builder = TraceBuilder("long", "test", 4)
    for number in (1, 2):
        builder.add(number, [10, 11, 12, 13], 0.0, 16, 0)
    profile = stack.profile(builder.finish())
    assert [stack.request_hits(profile, capacity)[1] for capacity in range(6)] == [0, 1, 2, 3, 4, 4]


def test_request_hits_at_unlimited_capacity_counts_every_reused_block() -> None:
    builder = TraceBuilder("two", "test", 4)
    builder.add(1, [1, 2], 0.0, 8, 0)
    builder.add(2, [1, 2, 3], 5.0, 12, 0)
    profile = stack.profile(builder.finish())
    assert stack.request_hits(profile, math.inf).tolist() == [0, 2]
    assert profile.age_s.tolist() == [5.0]
    assert stack.request_hits(profile, math.inf, max_age_s=4.0).tolist() == [0, 0]
