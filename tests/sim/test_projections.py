"""Closed forms against direct simulations of what they claim to be."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.sim import projections, stack
from lmc.sim.build import TraceBuilder
from lmc.sim.trace import Trace
from tests.sim.chained_traces import BLOCK_TOKENS, naive_lru, tokens_of, traces

SMALL = st.integers(1, 12)


@settings(max_examples=200, deadline=None)
@given(traces(), st.sampled_from(["all", "last-half"]))
def test_ttl_plane_equals_a_direct_simulation(trace: Trace, window: str) -> None:
    ttls, capacities = (0.0, 1.0, 3.0, math.inf), (1, 2, 5, math.inf)
    plane = projections.ttl_plane(stack.profile(trace), ttls, capacities, window)  # type: ignore[arg-type]
    first = trace.num_requests // 2 if window == "last-half" else 0
    for ttl_s, row in zip(ttls, plane, strict=True):
        for capacity, (blocks, tokens) in zip(capacities, row, strict=True):
            hits = naive_lru(trace, min(capacity, trace.num_unique), ttl_s)  # type: ignore[arg-type]
            assert blocks == sum(hits[first:])
            assert tokens == sum(tokens_of(trace, first + index, found) for index, found in enumerate(hits[first:]))


@settings(max_examples=200, deadline=None)
@given(traces(), SMALL)
def test_squares_are_those_of_the_hit_tokens(trace: Trace, capacity: int) -> None:
    profile = stack.profile(trace)
    squares = projections.hit_squares(profile)
    hits = naive_lru(trace, capacity)
    expected = sum(tokens_of(trace, request, found) ** 2 for request, found in enumerate(hits))
    assert squares[min(capacity, trace.num_unique)] == expected


def test_groups_share_the_cache_and_add_up() -> None:
    builder = TraceBuilder("groups", "test", BLOCK_TOKENS)
    for number, (chain, tenant) in enumerate([([1, 2], "a"), ([1, 3], "b"), ([1, 2], "a"), ([1, 3], "b"), ([4], "a")]):
        builder.add(number + 1, chain, float(number), len(chain) * BLOCK_TOKENS, 0, tenant=tenant)
    profile = stack.profile(builder.finish())
    groups = projections.group_curves(profile)
    whole = stack.hit_curve(profile)
    assert [groups[name].at(math.inf)[0] for name in ("a", "b")] == [2, 3]
    assert [groups[name].total_blocks for name in ("a", "b")] == [5, 4]
    for capacity in range(5):
        assert sum(curve.at(capacity)[0] for curve in groups.values()) == whole.at(capacity)[0]
    half = projections.group_curves(profile, "last-half")
    assert sum(curve.total_tokens for curve in half.values()) == stack.hit_curve(profile, "last-half").total_tokens
