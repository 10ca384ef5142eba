from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.policy import POLICIES
from lmc.errors import ConfigError
from lmc.sim import stack
from lmc.sim.belady import belady_hits
from lmc.sim.build import TraceBuilder
from lmc.sim.policy_check import trace_of
from lmc.sim.policy_replay import ReplayOptions, replay_policy
from tests.contracts.policy import run_spec, workloads

names = pytest.mark.parametrize("name", sorted(POLICIES))
LRU = POLICIES["lru"]


@names
@settings(max_examples=40, deadline=None)
@given(workloads(), st.integers(1, 14))
def test_compiled_interpreted_and_live_host_take_the_same_decisions(
    name: str, requests: list[list[int]], capacity: int
) -> None:
    trace, keys = trace_of(requests)
    spec = POLICIES[name]
    [fast] = replay_policy(trace, spec, [capacity], log_victims=True, workers=1)
    [slow] = replay_policy(trace, spec, [capacity], log_victims=True, compiled=False)
    host = run_spec(spec, requests, capacity)
    assert fast.victims.tolist() == slow.victims.tolist()
    assert [keys[node] for node in fast.victims.tolist()] == host.victims
    assert fast.request_hits.tolist() == slow.request_hits.tolist() == host.hits
    assert fast.resident == slow.resident == len(host.there)
    assert fast.evictions == len(host.victims)


options = st.builds(
    ReplayOptions,
    admit_touches=st.integers(1, 3),
    low_watermark=st.sampled_from([1.0, 0.8, 0.3]),
    write_delay_s=st.sampled_from([0.0, 1.0, 4.0]),
    ttl_s=st.sampled_from([math.inf, 0.0, 2.0, 7.0]),
    ttl_sliding=st.booleans(),
)


@names
@settings(max_examples=30, deadline=None)
@given(workloads(), st.integers(1, 14), options, st.data())
def test_compiled_equals_interpreted_with_every_option(
    name: str, requests: list[list[int]], capacity: int, chosen: ReplayOptions, data: st.DataObject
) -> None:
    gaps = data.draw(st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=len(requests), max_size=len(requests)))
    trace, _ = trace_of(requests, np.cumsum(gaps).tolist())
    [fast] = replay_policy(trace, POLICIES[name], [capacity], chosen, log_victims=True, workers=1)
    [slow] = replay_policy(trace, POLICIES[name], [capacity], chosen, log_victims=True, compiled=False)
    assert fast.victims.tolist() == slow.victims.tolist()
    assert fast.request_hits.tolist() == slow.request_hits.tolist()
    assert (fast.evictions, fast.resident) == (slow.evictions, slow.resident)


@settings(max_examples=100, deadline=None)
@given(workloads(), st.lists(st.integers(1, 14), min_size=1, max_size=4))
def test_lru_equals_the_stack_engine(requests: list[list[int]], capacities: list[int]) -> None:
    trace, _ = trace_of(requests)
    profile = stack.profile(trace)
    for result in replay_policy(trace, LRU, capacities, workers=2):
        assert result.request_hits.tolist() == stack.request_hits(profile, result.capacity).tolist()


@settings(max_examples=100, deadline=None)
@given(workloads(), st.integers(1, 14), st.sampled_from([0.0, 1.0, 3.0, 6.0]), st.data())
def test_sliding_ttl_on_lru_equals_the_stack_engine(
    requests: list[list[int]], capacity: int, ttl_s: float, data: st.DataObject
) -> None:
    gaps = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=len(requests), max_size=len(requests)))
    trace, _ = trace_of(requests, np.cumsum(gaps).tolist())
    [result] = replay_policy(trace, LRU, [capacity], ReplayOptions(ttl_s=ttl_s), workers=1)
    assert result.request_hits.tolist() == stack.request_hits(stack.profile(trace), capacity, ttl_s).tolist()


@names
@settings(max_examples=30, deadline=None)
@given(workloads(), st.integers(1, 14), st.integers(1, 3))
def test_belady_is_never_beaten(name: str, requests: list[list[int]], capacity: int, admit_touches: int) -> None:
    trace, _ = trace_of(requests)
    [bound] = belady_hits(trace, [capacity], workers=1)
    [result] = replay_policy(trace, POLICIES[name], [capacity], ReplayOptions(admit_touches=admit_touches), workers=1)
    assert result.hit_blocks(trace) <= bound.hit_blocks(trace)


def test_a_request_longer_than_the_cache_keeps_its_head() -> None:
    trace, _ = trace_of([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    for spec in POLICIES.values():
        [result] = replay_policy(trace, spec, [3], workers=1)
        assert result.request_hits.tolist() == [0, 3]


def test_fixed_ttl_counts_from_the_store_and_sliding_from_the_touch() -> None:
    trace, _ = trace_of([[1], [1, 2], [1, 2], [9], [1, 2]], [0.0, 5.0, 11.0, 11.0, 16.0])
    fixed = ReplayOptions(ttl_s=10.0, ttl_sliding=False)
    [result] = replay_policy(trace, LRU, [10], fixed, workers=1)
    # At 11 s block 1 is past its 10 s, so block 2 is of no use: both are computed and stored again.
    assert result.request_hits.tolist() == [0, 1, 0, 0, 2]
    [sliding] = replay_policy(trace, LRU, [10], ReplayOptions(ttl_s=10.0), workers=1)
    assert sliding.request_hits.tolist() == [0, 1, 2, 0, 2]


def test_an_expired_parent_goes_with_its_last_child() -> None:
    trace, _ = trace_of([[1], [1, 2], [8], [9]], [0.0, 5.0, 12.0, 15.5])
    for seconds, resident in [(12.0, 3), (15.5, 2)]:
        upto = int(np.searchsorted(trace.timestamps_s, seconds)) + 1
        part, _ = trace_of([[1], [1, 2], [8], [9]][:upto], trace.timestamps_s[:upto].tolist())
        [result] = replay_policy(part, LRU, [10], ReplayOptions(ttl_s=10.0, ttl_sliding=False), workers=1)
        assert result.resident == resident


def test_write_delay_hides_a_block_until_it_is_written() -> None:
    trace, _ = trace_of([[1, 2], [1, 2], [1, 2]], [0.0, 1.0, 3.0])
    [result] = replay_policy(trace, LRU, [10], ReplayOptions(write_delay_s=2.0), workers=1)
    assert result.request_hits.tolist() == [0, 0, 2]


def test_admission_stores_at_the_nth_request() -> None:
    trace, _ = trace_of([[1, 2], [1, 3], [1, 2], [1, 2]])
    [result] = replay_policy(trace, LRU, [10], ReplayOptions(admit_touches=2), workers=1)
    assert result.request_hits.tolist() == [0, 0, 1, 2]
    assert result.resident == 2


def test_low_watermark_evicts_in_batches() -> None:
    trace, _ = trace_of([[label] for label in range(11)] + [[9]])
    [result] = replay_policy(trace, LRU, [10], ReplayOptions(low_watermark=0.5), workers=1)
    assert (result.evictions, result.resident) == (6, 5)


def test_tokens_of_a_partial_last_block_count_once() -> None:
    builder = TraceBuilder("two", "test", 4)
    builder.add(1, [1, 2], 0.0, 7, 1)
    builder.add(2, [1, 2], 1.0, 7, 1)
    trace = builder.finish()
    [result] = replay_policy(trace, LRU, [2], workers=1)
    assert (result.hit_blocks(trace), result.hit_tokens(trace)) == (2, 7)
    assert result.hit_tokens(trace, "last-half") == 7


@pytest.mark.parametrize("bad", [{"admit_touches": 0}, {"low_watermark": 0.0}, {"ttl_s": -1.0}])
def test_bad_options_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ReplayOptions(**bad)  # type: ignore[arg-type]


def test_bad_capacity_is_refused() -> None:
    trace, _ = trace_of([[1]])
    with pytest.raises(ConfigError, match="at least one trace block, not 0"):
        replay_policy(trace, LRU, [4, 0])
