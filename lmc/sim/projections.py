"""Exact results that follow from one stack pass: hits by sliding TTL and capacity, hits by tenant, and hits weighted by prefill work.

Other questions need a replay (lmc.sim.policy_replay, lmc.sim.full_replay): a TTL that touches do not renew, a lower tier that hits in the
upper one do not touch, admission and watermarks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmc.compiled import compiled
from lmc.sim.stack import HitCurve, StackProfile, hit_curve
from lmc.sim.trace import Int32, Int64, Window

Hits = tuple[int, int]  # trace blocks, tokens


def ttl_plane(
    stack: StackProfile, ttls_s: Sequence[float], capacities: Sequence[float], window: Window = "all"
) -> list[list[Hits]]:
    """Hits by TTL (outer) and capacity in trace blocks (inner). A trace block is dropped if it was not touched for longer than the TTL."""
    curves = (hit_curve(stack, window, stack.age_s <= ttl_s) for ttl_s in ttls_s)
    return [[curve.at(capacity) for capacity in capacities] for curve in curves]


def group_curves(stack: StackProfile, window: Window = "all") -> dict[str, HitCurve]:
    """A curve for each tenant of one shared cache. Their hits add up to those of the whole curve."""
    trace = stack.trace
    curves = {}
    for code, name in enumerate(trace.tenant_names):
        mine = trace.tenants == code
        mine[: trace.first_request(window)] = False
        blocks = int(np.diff(trace.starts)[mine].sum())
        tokens = int(trace.input_tokens[mine].sum())
        curve = hit_curve(stack, window, mine[stack.request])
        curves[name] = HitCurve(curve.hit_blocks, curve.hit_tokens, blocks, tokens)
    return curves


def hit_squares(stack: StackProfile, window: Window = "all") -> Int64:
    """(num_unique + 1,) sum of the requests' squared hit tokens at every capacity, which measures the attention work that hits save."""
    trace = stack.trace
    begin = int(np.searchsorted(stack.request, trace.first_request(window)))
    return _squares(
        stack.request[begin:],
        stack.first[begin:],
        stack.length[begin:],
        stack.above[begin:],
        trace.input_tokens,
        trace.block_tokens,
        trace.num_unique,
    )


@compiled()
def _squares(
    request: Int32, first: Int32, length: Int32, above: Int32, input_tokens: Int64, block_tokens: int, num_unique: int
) -> Int64:
    at_rank = np.zeros(num_unique + 1, dtype=np.int64)
    for row in range(request.size):
        tokens = input_tokens[request[row]]
        start = min(first[row] * block_tokens, tokens)
        for index in range(length[row]):
            end = min(start + block_tokens, tokens)
            at_rank[above[row] + 1 + index] += end * end - start * start
            start = end
    return np.cumsum(at_rank)
