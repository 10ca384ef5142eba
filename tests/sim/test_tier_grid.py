from __future__ import annotations

import math
from collections import OrderedDict
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.sim import stack
from lmc.sim.cost import CostModel, Prefill, TierCost
from lmc.sim.tier_grid import tier_grid
from lmc.sim.trace import Trace
from tests.sim.chained_traces import chain_of, naive_lru, tokens_of, traces

COST = CostModel(
    Prefill(0.0, 1.0, 0.0), 1, {"host": TierCost("host", 1e12), "disk": TierCost("disk", 1e9, 0.0, 1024.0**3)}, 3600.0
)


def naive_exclusive(trace: Trace, capacities: list[int]) -> list[list[int]]:
    """Blocks that each request finds in each tier; what a tier evicts moves down, what is hit moves to the first."""
    tiers: list[OrderedDict[int, None]] = [OrderedDict() for _ in capacities]
    found = []
    for request in range(trace.num_requests):
        chain = chain_of(trace, request)
        hits = [0] * len(tiers)
        for block in chain:
            where = [index for index, tier in enumerate(tiers) if block in tier]
            if not where:
                break
            hits[where[0]] += 1
        found.append(hits)
        for block in reversed(chain):
            for tier in tiers:
                tier.pop(block, None)
            moved: int | None = block
            for tier, capacity in zip(tiers, capacities, strict=True):
                if moved is None:
                    break
                tier[moved] = None
                moved = tier.popitem(last=False)[0] if len(tier) > capacity else None
    return found


@settings(max_examples=300, deadline=None)
@given(traces(), st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_exclusive_tiers_equal_a_direct_simulation(trace: Trace, capacities: list[int]) -> None:
    names = ("host", "disk", "remote")[: len(capacities)]
    sizes = {name: [capacity] for name, capacity in zip(names, capacities, strict=True)}
    (point,) = tier_grid(stack.profile(trace), sizes, exclusive=True)
    expected = dict.fromkeys(names, 0)
    for request, hits in enumerate(naive_exclusive(trace, capacities)):
        reached = [tokens_of(trace, request, sum(hits[:tier])) for tier in range(len(hits) + 1)]
        for name, before, after in zip(names, reached, reached[1:], strict=False):
            expected[name] += after - before
    assert point.hit_tokens == expected


@settings(max_examples=150, deadline=None)
@given(traces())
def test_points_equal_caches_of_those_sizes(trace: Trace) -> None:
    sizes = {"host": [1, 3], "disk": [0, 2, math.inf]}
    for exclusive in (False, True):
        points = tier_grid(stack.profile(trace), sizes, exclusive=exclusive)
        for point, (host, disk) in zip(points, product(*sizes.values()), strict=True):
            together = min(host + disk if exclusive else max(host, disk), trace.num_unique)
            tokens = [
                sum(tokens_of(trace, request, found) for request, found in enumerate(naive_lru(trace, int(capacity))))
                for capacity in (host, together)
            ]
            assert point.blocks == {"host": host, "disk": disk}
            assert point.hit_tokens == {"host": tokens[0], "disk": tokens[1] - tokens[0]}
            assert point.total_tokens == trace.num_tokens


@settings(max_examples=50, deadline=None)
@given(traces())
def test_money_and_times_follow_from_the_hits(trace: Trace) -> None:
    (none,) = tier_grid(stack.profile(trace), {"host": [0], "disk": [0]}, cost=COST)
    (all_,) = tier_grid(stack.profile(trace), {"host": [math.inf], "disk": [2]}, cost=COST)
    assert none.worth is not None and all_.worth is not None
    assert none.worth.saved_prefill_s == 0
    assert (
        abs(none.worth.dollars_per_million - 1e6) < 1e-3
    )  # a token costs a second of a GPU that costs a dollar a second
    # The last token of a prompt is computed even if all of it is cached.
    whole = [min(hit, int(size) - 1) for hit, size in zip(_unlimited(trace), trace.input_tokens, strict=True)]
    assert abs(all_.worth.saved_prefill_s - sum(max(tokens, 0) for tokens in whole)) < 1e-6
    hours = (trace.timestamps_s[-1] - trace.timestamps_s[0]) / 3600
    rent = min(2, trace.num_unique) * trace.block_tokens * hours
    dollars = trace.num_tokens - all_.worth.saved_prefill_s + rent
    assert abs(all_.worth.dollars_per_million - dollars / trace.num_tokens * 1e6) < 1e-3
    assert all(all_.worth.ttft_s[p] <= none.worth.ttft_s[p] for p in (50, 90, 99))


def _unlimited(trace: Trace) -> list[int]:
    return [tokens_of(trace, request, found) for request, found in enumerate(naive_lru(trace, trace.num_unique))]
