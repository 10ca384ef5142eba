"""A study: hits of policies x chunk sizes x capacities on one trace, as plain rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmc.sim import capacity, stack
from lmc.sim.policies import check_policies, hits_at
from lmc.sim.policy_replay import PLAIN, ReplayOptions
from lmc.sim.trace import Trace, Window, coarsen, require_blocks


@dataclass(frozen=True)
class Row:
    policy: str
    chunk_tokens: int
    capacity_blocks: float  # chunks of chunk_tokens; infinity = no eviction
    hit_blocks: int
    total_blocks: int
    hit_tokens: int
    total_tokens: int

    @property
    def token_hit_rate(self) -> float:
        return self.hit_tokens / self.total_tokens

    @property
    def block_hit_rate(self) -> float:
        return self.hit_blocks / self.total_blocks


@dataclass(frozen=True)
class Study:
    trace: Trace
    window: Window
    rows: list[Row]
    curves: dict[int, stack.HitCurve] = field(default_factory=dict)  # LRU at every capacity, by chunk size
    notes: tuple[str, ...] = ()


def run_study(
    trace: Trace,
    policies: Sequence[str],
    capacities: capacity.CapacityOptions,
    window: Window = "all",
    chunk_sizes: Sequence[int] = (),
    options: ReplayOptions = PLAIN,
) -> Study:
    """Rows in the order chunk size, policy, capacity. Without chunk sizes the blocks are taken as recorded, partial last ones too."""
    require_blocks(trace)
    check_policies(policies)
    rows: list[Row] = []
    curves: dict[int, stack.HitCurve] = {}
    notes = list(trace.notes)
    for chunked in [coarsen(trace, size) for size in chunk_sizes] or [trace]:
        sizes = capacity.resolve(capacities, chunked)
        curve = stack.hit_curve(stack.profile(chunked), window)
        curves[chunked.block_tokens] = curve
        small = min(sizes, default=math.inf)
        if small < chunked.longest:
            notes.append(
                f"capacity {small:,.0f} is below the longest request of {trace.source} ({chunked.longest:,} blocks): "
                "such a request keeps its first blocks only; raise the capacity to hold whole requests"
            )
        for policy in policies:
            hits = hits_at(chunked, policy, sizes, window, curve, options)
            rows += [
                Row(policy, chunked.block_tokens, size, blocks, curve.total_blocks, tokens, curve.total_tokens)
                for size, (blocks, tokens) in zip(sizes, hits, strict=True)
            ]
    return Study(trace, window, rows, curves, tuple(notes))
