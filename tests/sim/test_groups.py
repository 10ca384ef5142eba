from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.sim import groups, stack
from lmc.sim.build import TraceBuilder
from lmc.sim.stack import HitCurve
from lmc.sim.trace import Trace, select_requests


def made(picks: list[tuple[int, str]]) -> Trace:
    """Each request is one block of a tenant; tenants share no blocks."""
    builder = TraceBuilder("tenants", "test", 4)
    for number, (block, tenant) in enumerate(picks):
        builder.add(number + 1, [block * 10 + ord(tenant)], float(number), 4, 0, tenant=tenant)
    return builder.finish()


def curve(*gains: int) -> HitCurve:
    hits = np.concatenate(([0], np.cumsum(gains)))
    return HitCurve(hits, hits, 1, 100)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=3), st.integers(0, 9))
def test_split_is_the_best_one_for_concave_curves(gains: list[list[int]], capacity: int) -> None:
    curves = [curve(*sorted(some, reverse=True)) for some in gains]
    quotas = groups.split(curves, capacity)
    assert sum(quotas) <= capacity
    reached = sum(each.at(quota)[1] for each, quota in zip(curves, quotas, strict=True))
    choices = itertools.product(*(range(each.hit_tokens.size) for each in curves))
    best = max(
        sum(each.at(quota)[1] for each, quota in zip(curves, choice, strict=True))
        for choice in choices
        if sum(choice) <= capacity
    )
    assert reached == best


def test_split_looks_past_a_flat_start() -> None:
    assert groups.split([curve(0, 0, 30), curve(5, 1, 1)], 4) == [3, 1]


def test_groups_of_a_small_trace() -> None:
    trace = made([(1, "a"), (2, "b"), (3, "b"), (1, "a"), (2, "b"), (3, "b"), (9, "a")])
    rows = groups.group_hits(trace, 3)
    assert [(row.group, row.requests, row.total_tokens) for row in rows] == [("a", 3, 12), ("b", 4, 16)]
    assert [row.shared_hit_tokens for row in rows] == [4, 8]
    assert [(row.quota_blocks, row.quota_hit_tokens) for row in rows] == [(1, 4), (2, 8)]
    (first, second) = groups.group_hits(trace, 3, "last-half")
    assert (first.requests, second.requests) == (2, 2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from("ab")), min_size=1, max_size=30))
def test_a_selected_tenant_behaves_like_a_trace_of_its_own(picks: list[tuple[int, str]]) -> None:
    trace = made(picks)
    mine = [pick for pick in picks if pick[1] == picks[0][1]]
    part = select_requests(trace, trace.tenants == 0)
    alone = made(mine)
    assert part.ids.tolist() == alone.ids.tolist()
    assert part.parents.tolist() == alone.parents.tolist()
    assert part.starts.tolist() == alone.starts.tolist()
    assert stack.hit_curve(stack.profile(part)).hit_tokens.tolist() == pytest.approx(
        stack.hit_curve(stack.profile(alone)).hit_tokens.tolist()
    )
