"""The real directory on a virtual clock, against the closed forms and against times that can be added up by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmc.cache.config import CacheConfig
from lmc.cache.policy import POLICIES
from lmc.cache.tiers.format import stored_bytes
from lmc.errors import ConfigError
from lmc.sim import stack
from lmc.sim.build import TraceBuilder
from lmc.sim.cost import CostModel, Prefill, TierCost
from lmc.sim.engine_model import EngineModel
from lmc.sim.full_replay import Fleet, ReplayResult, replay_fleet
from lmc.sim.policy_replay import replay_policy
from lmc.sim.router import Router
from lmc.sim.shared_store import SharedStore
from lmc.sim.trace import Trace, coarsen, select_requests
from tests.sim.chained_traces import BLOCK_TOKENS, naive_lru, traces

CHUNK_BYTES = 10


def config(host: int, disk: int = 0, **more: object) -> CacheConfig:
    below = {"disk": {"path": "/nowhere", "capacity": disk * stored_bytes(CHUNK_BYTES)}} if disk else {}
    return CacheConfig.model_validate({"host": {"capacity": host * CHUNK_BYTES}, **below, **more})


def full_chunks(trace: Trace) -> Trace:
    """No partial tails, and prompts that never end with a chunk, so that all of a prefix may be loaded."""
    assume(any(trace.input_tokens[r] >= BLOCK_TOKENS for r in range(trace.num_requests)))
    chunked = coarsen(trace, BLOCK_TOKENS)
    chunked.input_tokens[:] = np.diff(chunked.starts) * BLOCK_TOKENS + 1
    return chunked


def chunks(result: ReplayResult) -> list[int]:
    return (sum(result.hit_tokens.values()) // BLOCK_TOKENS).tolist()


@settings(max_examples=150, deadline=None)
@given(traces(), st.integers(1, 12))
def test_host_hits_equal_the_stack_engine(trace: Trace, capacity: int) -> None:
    trace = full_chunks(trace)
    result = replay_fleet(trace, config(capacity), CHUNK_BYTES, Fleet())
    assert chunks(result) == naive_lru(trace, capacity)


@settings(max_examples=150, deadline=None)
@given(traces(), st.integers(1, 12), st.sampled_from(sorted(POLICIES)))
def test_host_hits_equal_the_compiled_replay(trace: Trace, capacity: int, policy: str) -> None:
    trace = full_chunks(trace)
    result = replay_fleet(trace, config(capacity, policy=policy), CHUNK_BYTES, Fleet())
    (expected,) = replay_policy(trace, POLICIES[policy], [capacity], compiled=False)
    assert chunks(result) == expected.request_hits.tolist()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_request_longer_than_the_host_leaves_the_policy_as_the_compiled_replay_does(policy: str) -> None:
    """The live cache looks in vain for a place for the fifth chunk; the replay knows before that there is none."""
    trace = requests((0.0, [1]), (1.0, [1, 2]), (2.0, [1, 3, 4, 5, 6]), (3.0, [7]), (4.0, [8, 9, 10]), (5.0, [1]))
    result = replay_fleet(trace, config(4, policy=policy), CHUNK_BYTES, Fleet())
    (expected,) = replay_policy(trace, POLICIES[policy], [4], compiled=False)
    assert chunks(result) == expected.request_hits.tolist()


@settings(max_examples=150, deadline=None)
@given(traces(), st.integers(0, 4), st.integers(1, 12))
def test_a_larger_disk_below_the_host_hits_what_one_cache_of_its_size_hits(
    trace: Trace, spare: int, extra: int
) -> None:
    trace = full_chunks(trace)
    host = int(np.diff(trace.starts).max()) + spare
    result = replay_fleet(trace, config(host, host + extra), CHUNK_BYTES, Fleet())
    assert chunks(result) == naive_lru(trace, host + extra)


@settings(max_examples=100, deadline=None)
@given(traces(), st.integers(1, 6), st.integers(1, 3))
def test_round_robin_gives_each_instance_its_own_trace(trace: Trace, capacity: int, instances: int) -> None:
    trace = full_chunks(trace)
    result = replay_fleet(trace, config(capacity), CHUNK_BYTES, Fleet(instances))
    numbers = np.arange(trace.num_requests)
    assert result.instance.tolist() == (numbers % instances).tolist()
    for instance in range(min(instances, trace.num_requests)):
        mine = numbers % instances == instance
        part = select_requests(trace, mine)
        assert np.array(chunks(result))[mine].tolist() == naive_lru(part, capacity)


@settings(max_examples=100, deadline=None)
@given(traces(), st.integers(1, 6), st.integers(0, 6), st.integers(2, 3))
def test_instances_with_one_memory_hit_what_one_instance_with_all_of_it_hits(
    trace: Trace, host: int, disk: int, instances: int
) -> None:
    trace = full_chunks(trace)
    result = replay_fleet(trace, config(host, disk), CHUNK_BYTES, Fleet(instances, shared_host=True))
    alone = replay_fleet(trace, config(instances * host, instances * disk), CHUNK_BYTES, Fleet())
    assert {tier: tokens.tolist() for tier, tokens in result.hit_tokens.items()} == {
        tier: tokens.tolist() for tier, tokens in alone.hit_tokens.items()
    }
    assert result.counts == alone.counts


def requests(*rows: tuple[float, list[int]]) -> Trace:
    builder = TraceBuilder("made", "test", BLOCK_TOKENS)
    for number, (t, chain) in enumerate(rows):
        builder.add(number + 1, chain, t, len(chain) * BLOCK_TOKENS + 1, 0)
    return builder.finish()


COST = CostModel(
    Prefill(0.0, 1.0, 0.0),  # a second a token
    1,
    {
        "host": TierCost("host", 20.0),  # half a second a chunk
        "disk": TierCost("disk", 5.0, 1.0),  # two seconds a chunk, and one
        "remote": TierCost("remote", 10.0),
    },
)

BESIDE = replace(COST, engine=EngineModel(background_copies=True))


def test_times_add_up() -> None:
    trace = requests((0.0, [1, 2]), (3.0, [7]), (100.0, [1, 2]), (101.0, [1, 5]))
    result = replay_fleet(trace, config(100), CHUNK_BYTES, Fleet(cost=BESIDE))
    assert result.ttft_s.tolist() == [
        9.0,  # nothing cached
        11.0,  # waits for the engine until 9, then 5 tokens
        2.0,  # loads two chunks in 1 s, computes 1 token
        6.5,  # is taken in at 102, loads one chunk until 102.5, computes 5 tokens
    ]
    assert result.hits("all") == {"host": 12}
    assert result.hits("last-half") == {"host": 12}
    assert result.total_tokens("last-half") == 18


def test_a_chunk_is_no_hit_before_its_store_is_done() -> None:
    trace = requests((0.0, [1]), (5.2, [1]), (20.0, [1]))  # computed at 5, in host at 5.5
    result = replay_fleet(trace, config(100), CHUNK_BYTES, Fleet(cost=BESIDE))
    assert result.hit_tokens["host"].tolist() == [0, 0, 4]
    result = replay_fleet(trace, config(100), CHUNK_BYTES, Fleet(cost=COST))  # an engine that waits for its stores
    assert result.hit_tokens["host"].tolist() == [0, 4, 4]


def test_disk_hits_wait_for_staging_and_count_for_the_disk() -> None:
    trace = requests((0.0, [1]), (50.0, [2]), (100.0, [1]))
    result = replay_fleet(trace, config(1, 10), CHUNK_BYTES, Fleet(cost=COST))
    assert result.hit_tokens["disk"].tolist() == [0, 0, 4]
    assert result.ttft_s[2] == pytest.approx(3.0 + 0.5 + 1.0)  # staged, loaded, computed


def test_staging_is_given_up_at_the_deadline() -> None:
    trace = requests((0.0, [1]), (50.0, [2]), (100.0, [1]))
    result = replay_fleet(trace, config(1, 10, load_deadline=2.0), CHUNK_BYTES, Fleet(cost=COST))
    assert result.hit_tokens["disk"].tolist() == [0, 0, 0]
    assert result.ttft_s[2] == pytest.approx(2.0 + 5.0)
    assert result.counts["late"] == 1


def test_chunks_expire() -> None:
    trace = requests((0.0, [1]), (5.0, [1]), (11.0, [1]), (30.0, [1]))
    result = replay_fleet(trace, config(9, ttl=8.0), CHUNK_BYTES, Fleet())
    assert result.hit_tokens["host"].tolist() == [0, 4, 4, 0]


def test_a_fixed_time_to_live_is_not_renewed() -> None:
    trace = requests((0.0, [1]), (5.0, [1]), (11.0, [1]), (15.0, [1]))
    result = replay_fleet(trace, config(9, ttl=8.0, ttl_mode="fixed"), CHUNK_BYTES, Fleet())
    assert result.hit_tokens["host"].tolist() == [0, 4, 0, 4]


@pytest.mark.parametrize(("quota", "hits"), [(None, [0, 0, 0, 0, 0]), ("50%", [0, 0, 0, 0, 4]), (20, [0, 0, 0, 0, 4])])
def test_a_tenant_at_its_quota_evicts_its_own(quota: str | int | None, hits: list[int]) -> None:
    builder = TraceBuilder("made", "test", BLOCK_TOKENS)
    for number, (tenant, block) in enumerate([("small", 1), ("big", 2), ("big", 3), ("big", 4), ("small", 1)]):
        builder.add(number + 1, [block], float(number), BLOCK_TOKENS + 1, 0, tenant=tenant)
    result = replay_fleet(builder.finish(), config(3, tenant_quota=quota), CHUNK_BYTES, Fleet())
    assert result.hit_tokens["host"].tolist() == hits


@pytest.mark.parametrize(("write", "tiers"), [("through", ["disk"]), ("around", []), ("back", ["disk"])])
def test_write_modes_decide_what_the_disk_holds(write: str, tiers: list[str]) -> None:
    trace = requests((0.0, [1]), (1.0, [2]), (2.0, [3]), (3.0, [4]), (4.0, [1]))
    result = replay_fleet(trace, config(2, 10, write=write), CHUNK_BYTES, Fleet())
    assert [tier for tier, tokens in result.hit_tokens.items() if tokens[4]] == tiers


def test_a_shared_tier_serves_what_another_instance_stored() -> None:
    trace = requests((0.0, [1, 2]), (50.0, [1, 2]))
    alone = replay_fleet(trace, config(9), CHUNK_BYTES, Fleet(2))
    together = replay_fleet(trace, config(9), CHUNK_BYTES, Fleet(2, shared_chunks=10, cost=COST))
    assert chunks(alone) == [0, 0]
    assert together.hit_tokens["remote"].tolist() == [0, 8]
    assert together.ttft_s[1] == pytest.approx(2.0 + 1.0 + 1.0)


def test_engines_with_one_memory_load_what_another_stored_and_wait_for_what_another_stages() -> None:
    trace = requests((0.0, [1]), (50.0, [1]), (100.0, [2, 3]), (200.0, [1]), (200.0, [1]))
    result = replay_fleet(trace, config(1, 10), CHUNK_BYTES, Fleet(2, shared_host=True, cost=COST))
    assert result.hit_tokens["host"].tolist() == [0, 4, 0, 0, 0]
    assert result.hit_tokens["disk"].tolist() == [0, 0, 0, 4, 4]
    assert result.ttft_s[1] == pytest.approx(0.5 + 1.0)
    assert result.ttft_s[3:].tolist() == [4.5, 4.5]  # staged once, loaded and computed by each


def test_several_shared_tiers_are_named_and_priced_alike() -> None:
    trace = requests((0.0, [1, 2]), (50.0, [1, 2]))
    fleet = Fleet(2, shared_chunks=10, shared_names=("redis", "s3"), cost=COST)
    result = replay_fleet(trace, config(9), CHUNK_BYTES, fleet)
    assert {tier: tokens.tolist() for tier, tokens in result.hit_tokens.items()} == {
        "host": [0, 0], "redis": [0, 8], "s3": [0, 0],
    }  # fmt: skip
    assert result.ttft_s[1] == pytest.approx(2.0 + 1.0 + 1.0)  # as fast as the remote tier of the cost model


def test_the_whole_prompt_is_never_loaded() -> None:
    trace = requests((0.0, [1, 2]), (9.0, [1, 2]))
    trace.input_tokens[:] = 8
    result = replay_fleet(trace, config(9), CHUNK_BYTES, Fleet())
    assert chunks(result) == [0, 1]


def test_settings_that_cannot_be_simulated_are_refused() -> None:
    trace = requests((0.0, [1]))
    with pytest.raises(ConfigError, match="64GiB"):
        replay_fleet(trace, CacheConfig(), CHUNK_BYTES, Fleet())
    with pytest.raises(ConfigError, match="holds no chunk"):
        replay_fleet(trace, config(1), CHUNK_BYTES * 2, Fleet())
    with pytest.raises(ConfigError, match="at least 1"):
        replay_fleet(trace, config(1), CHUNK_BYTES, Fleet(0))


def test_prefix_routing_follows_long_matches_and_balances_the_rest() -> None:
    keys = [bytes([number]) * 32 for number in range(9)]
    router = Router("prefix", 2)
    assert router.choose(keys[:3], 100) == 0
    assert router.choose([keys[0], keys[5]], 10) == 1  # one shared chunk is no reason
    assert router.choose(keys[:4], 100) == 0
    assert router.choose([keys[0], keys[5], keys[6]], 10) == 1


def test_shared_store_evicts_what_was_used_longest_ago() -> None:
    store = SharedStore(2)
    a, b, c = (bytes([number]) * 32 for number in range(3))
    store.put(a)
    store.put(b)
    assert store.get(a)
    store.put(c)
    assert [key in store for key in (a, b, c)] == [True, False, True]
    assert not store.get(b) and len(store) == 2


@settings(max_examples=60, deadline=None)
@given(traces(), st.sampled_from(["through", "back", "around"]), st.integers(1, 5), st.integers(0, 9))
def test_every_replay_ends_with_no_more_hits_than_an_unlimited_cache(
    trace: Trace, write: str, host: int, disk: int
) -> None:
    trace = full_chunks(trace)
    for cost in (None, COST):
        fleet = Fleet(2, "prefix", shared_chunks=3, cost=cost)
        result = replay_fleet(trace, config(host, disk, write=write), CHUNK_BYTES, fleet)
        most = stack.request_hits(stack.profile(trace), np.inf)
        assert (np.array(chunks(result)) <= most).all()
        assert cost is None or (result.ttft_s > 0).all()
