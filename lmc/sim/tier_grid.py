"""Computes hits per tier for every combination of tier sizes and, with a cost model, time to first token and money."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

import numpy as np

from lmc.sim.cost import CostModel
from lmc.sim.stack import StackProfile, request_hits
from lmc.sim.trace import Int64, Trace, Window

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Worth:
    """The effect of the hits by the cost model."""

    ttft_s: dict[int, float]  # by percentile
    saved_prefill_s: float  # GPU seconds, of the window
    dollars_per_million: float  # prefill and tiers, per million input tokens


@dataclass(frozen=True)
class TierPoint:
    blocks: dict[str, float]  # size of each tier in trace blocks, fastest first
    hit_tokens: dict[str, int]
    total_tokens: int
    worth: Worth | None

    @property
    def hit_rate(self) -> float:
        """Hit tokens / all input tokens."""
        return sum(self.hit_tokens.values()) / max(self.total_tokens, 1)


def tier_grid(
    stack: StackProfile,
    sizes: Mapping[str, Sequence[float]],
    window: Window = "all",
    cost: CostModel | None = None,
    exclusive: bool = False,
) -> list[TierPoint]:
    """Points in the order of product(sizes), with tiers fastest first. Exclusive tiers hold a trace block once; others see every touch."""
    trace = stack.trace
    first = trace.first_request(window)
    inputs = trace.input_tokens[first:]
    tokens_at: dict[float, Int64] = {}

    def reached(capacity: float) -> Int64:
        if capacity not in tokens_at:
            tokens_at[capacity] = np.minimum(request_hits(stack, capacity)[first:] * trace.block_tokens, inputs)
        return tokens_at[capacity]

    points = []
    for blocks in product(*sizes.values()):
        below = np.zeros_like(inputs)
        loaded: dict[str, Int64] = {}
        for name, capacity in zip(sizes, accumulate(blocks) if exclusive else accumulate(blocks, max), strict=True):
            loaded[name] = reached(capacity) - below
            below = reached(capacity)
        by_name = dict(zip(sizes, blocks, strict=True))
        hits = {name: int(tokens.sum()) for name, tokens in loaded.items()}
        total = int(inputs.sum())
        worth = (
            None if cost is None else worth_of(trace, cost, _bytes(stack, by_name, cost), loaded, slice(first, None))
        )
        points.append(TierPoint(by_name, hits, total, worth))
    return points


def worth_of(
    trace: Trace, cost: CostModel, sizes_bytes: Mapping[str, float], loaded: Mapping[str, Int64], requests: slice
) -> Worth:
    """The worth of the hits of these requests; `loaded` has their tokens by tier, fastest first."""
    inputs = trace.input_tokens[requests]
    ttft, computed = cost.serve(inputs, loaded)
    whole = cost.prefill.seconds(np.zeros_like(inputs), inputs)
    times = trace.timestamps_s[requests]
    rent = cost.rent(sizes_bytes, float(times[-1] - times[0]) / 3600)
    dollars = computed.sum() / 3600 * cost.gpu_dollars_per_hour + rent
    return Worth(
        {p: float(np.percentile(ttft, p)) for p in PERCENTILES},
        float(whole.sum() - computed.sum()),
        float(dollars) / max(int(inputs.sum()), 1) * 1e6,
    )


def _bytes(stack: StackProfile, blocks: Mapping[str, float], cost: CostModel) -> dict[str, float]:
    """Bytes of each tier; an unlimited tier is as large as all unique trace blocks."""
    block_bytes = stack.trace.block_tokens * cost.token_bytes
    return {name: min(count, stack.trace.num_unique) * block_bytes for name, count in blocks.items()}
