"""NAME@N: policies that remember another number of evicted chunks than their papers say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.config import CacheConfig
from lmc.cache.policy import POLICIES, get_policy
from lmc.errors import ConfigError
from lmc.sim.policy_check import check_policy, trace_of
from lmc.sim.policy_replay import replay_policy
from tests.contracts.policy import run_spec, workloads

ABLE = ["2q", "arc", "lirs", "predictive", "s3fifo"]


@pytest.mark.parametrize("name", ABLE)
def test_with_its_own_number_a_policy_is_as_before(name: str) -> None:
    own = {"2q": "0.5", "arc": "1", "lirs": "2", "predictive": "4", "s3fifo": "0.9"}[name]
    draw = np.random.default_rng(3)
    trace, _ = trace_of([[int(label)] for label in draw.zipf(1.3, 3000) % 400])
    sizes = [10, 40, 100]
    plain = replay_policy(trace, POLICIES[name], sizes, log_victims=True)
    again = replay_policy(trace, get_policy(f"{name}@{own}"), sizes, log_victims=True)
    more = replay_policy(trace, get_policy(f"{name}@3"), sizes, log_victims=True)
    assert [run.victims.tolist() for run in plain] == [run.victims.tolist() for run in again]
    assert [run.victims.tolist() for run in plain] != [run.victims.tolist() for run in more]


@pytest.mark.parametrize("name", ABLE)
def test_the_contract_holds_with_more_ghosts(name: str) -> None:
    assert [one for one in check_policy(get_policy(f"{name}@4"), rounds=25) if not one.ok] == []


@settings(max_examples=60, deadline=None)
@given(workloads(), st.integers(2, 14))
def test_unbounded_lirs_is_lirs_with_more_ghosts_than_there_are_chunks(
    requests: list[list[int]], capacity: int
) -> None:
    """The paper's LIRS forgets a chunk only when it leaves the stack."""
    trace, _ = trace_of(requests)
    [unbounded] = replay_policy(trace, get_policy("lirs@inf"), [capacity], compiled=False)
    live = run_spec(get_policy("lirs@400"), requests, capacity)
    assert unbounded.request_hits.tolist() == live.hits


def test_bad_numbers_and_policies_without_ghosts_are_refused() -> None:
    for name, message in (
        ("lirs@many", "no number"),
        ("lirs@-1", "no number"),
        ("lirs@nan", "no number"),
        ("lru@4", "cannot be changed; that of 2q, arc, lirs, predictive, s3fifo can"),
        ("mru@4", "unknown eviction policy"),
    ):
        with pytest.raises(ConfigError, match=message):
            get_policy(name)
    assert CacheConfig.model_validate({"policy": "arc@4"}).policy == "arc@4"
    with pytest.raises(ValueError, match="without a limit"):
        CacheConfig.model_validate({"policy": "lirs@inf"})
