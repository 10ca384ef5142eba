from __future__ import annotations

import math
from itertools import product

from hypothesis import given, settings

from lmc.sim import stack
from lmc.sim.cost import CostModel, Prefill, TierCost
from lmc.sim.tier_grid import tier_grid
from lmc.sim.trace import Trace
from tests.sim.chained_traces import naive_lru, tokens_of, traces

COST = CostModel(
    Prefill(0.0, 1.0, 0.0), 1, {"host": TierCost("host", 1e12), "disk": TierCost("disk", 1e9, 0.0, 1024.0**3)}, 3600.0
)


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
