"""Sweeps policies, chunk sizes and capacities over one trace; the hits are plain rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lmc.errors import ConfigError
from lmc.sim import capacity, shards, stack
from lmc.sim.cost import CostModel
from lmc.sim.policies import check_policies, hits_at
from lmc.sim.policy_replay import PLAIN, ReplayOptions
from lmc.sim.trace import Trace, Window, coarsen, require_blocks


@dataclass(frozen=True)
class Row:
    policy: str
    chunk_tokens: int
    capacity_blocks: float  # of chunk_tokens each; infinity: no eviction
    hit_blocks: int
    total_blocks: int
    hit_tokens: int
    total_tokens: int
    error: float | None = None  # standard error of the token hit rate, if that is an estimate
    hit_bytes: int | None = None  # None if the bytes of a token are not known
    saved_prefill_s: float | None = None  # GPU seconds that the hits save; None without a cost model

    @property
    def token_hit_rate(self) -> float:
        return self.hit_tokens / max(self.total_tokens, 1)

    @property
    def block_hit_rate(self) -> float:
        return self.hit_blocks / max(self.total_blocks, 1)


@dataclass(frozen=True)
class Sweep:
    trace: Trace
    window: Window
    rows: list[Row]
    curves: dict[int, stack.HitCurve] = field(default_factory=dict)  # LRU at every capacity, by chunk size
    notes: tuple[str, ...] = ()

    @property
    def totals(self) -> dict[int, int]:
        """Measured trace blocks by chunk size."""
        return {row.chunk_tokens: row.total_blocks for row in self.rows}


def run_sweep(
    trace: Trace,
    policies: Sequence[str],
    capacities: capacity.CapacityOptions,
    window: Window = "all",
    chunk_sizes: Sequence[int] = (),
    options: ReplayOptions = PLAIN,
    cost: CostModel | None = None,
) -> Sweep:
    """Rows in the order chunk size, policy, capacity. Without chunk sizes the recorded trace blocks are used, with partial last ones.

    Raises ConfigError for an unknown policy or a capacity that cannot be used, TraceError for a trace without trace blocks.
    """
    require_blocks(trace)
    check_policies(policies)
    rows: list[Row] = []
    curves: dict[int, stack.HitCurve] = {}
    notes = list(trace.notes)
    for chunked in [coarsen(trace, size) for size in chunk_sizes] or [trace]:
        sizes = capacity.resolve(capacities, chunked)
        profile = stack.profile(chunked)
        curve = stack.hit_curve(profile, window)
        curves[chunked.block_tokens] = curve
        notes += capacity.warn_small(chunked, sizes)
        token_bytes = (
            capacities.token_bytes or chunked.block_bytes // chunked.block_tokens or (cost.token_bytes if cost else 0)
        )
        for policy in policies:
            for size, hits in zip(sizes, hits_at(profile, policy, sizes, window, curve, options), strict=True):
                rows.append(
                    Row(
                        policy,
                        chunked.block_tokens,
                        size,
                        hits.blocks,
                        curve.total_blocks,
                        hits.tokens,
                        curve.total_tokens,
                        hit_bytes=hits.tokens * token_bytes or None,
                        saved_prefill_s=cost.prefill.saved(hits.tokens, hits.squares) if cost else None,
                    )
                )
    return Sweep(trace, window, rows, curves, tuple(notes))


def sample_sweep(
    trace: Trace,
    policies: Sequence[str],
    capacities: capacity.CapacityOptions,
    window: Window,
    chunk_sizes: Sequence[int],
    rate: float,
) -> Sweep:
    """Hits of LRU, estimated from a share of the trace blocks. Raises ConfigError for any other policy."""
    require_blocks(trace)
    if list(policies) != ["lru"]:
        raise ConfigError("--shards estimates lru only; remove --policy")
    rows: list[Row] = []
    accesses = 0
    notes = list(trace.notes)
    for chunked in [coarsen(trace, size) for size in chunk_sizes] or [trace]:
        sizes = capacity.resolve(capacities, chunked)
        notes += capacity.warn_small(chunked, sizes)
        found = shards.estimate(chunked, rate, sizes, window)
        accesses += found.sampled_blocks
        first = chunked.first_request(window)
        blocks, tokens = chunked.num_blocks - int(chunked.starts[first]), int(chunked.input_tokens[first:].sum())
        for index, size in enumerate(sizes):
            hit_blocks = round(found.block_hit_rate[index] * blocks)
            hit_tokens = round(found.token_hit_rate[index] * tokens)
            error = float(found.error[index])
            rows.append(Row("lru", chunked.block_tokens, size, hit_blocks, blocks, hit_tokens, tokens, error))
    notes.append(
        f"the hits are estimated from {rate:.4g} of the trace blocks ({accesses:,} sampled accesses); the error is the standard error"
    )
    return Sweep(trace, window, rows, {}, tuple(notes))
