"""Computes all that `lmc sim report` shows of a trace: curves, policies, chunk sizes, TTLs, tier sizes, times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmc.cache.config import CacheConfig
from lmc.cache.policy import POLICIES
from lmc.cache.tiers.format import stored_bytes
from lmc.sim import projections
from lmc.sim.cost import CostModel, known_token_bytes
from lmc.sim.full_replay import Fleet, replay_fleet
from lmc.sim.policies import BOUND, replay_named
from lmc.sim.size import Sizer, Sizing
from lmc.sim.stack import HitCurve, StackProfile, hit_curve, profile
from lmc.sim.sweep import Row
from lmc.sim.tier_grid import TierPoint, tier_grid
from lmc.sim.trace import Float64, Trace, Window, coarsen, require_blocks

WINDOWS: tuple[Window, ...] = ("all", "last-half")
SHOWN: Window = "last-half"  # the window of all tables and pictures that show one: a running cache is warm
_CHUNK_FACTORS = (1, 2, 4, 8)
_TTLS_S = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 86400.0, float("inf"))
_GRID = 8  # sizes of each tier
TARGETS = (0.5, 0.8, 0.95)
_MODE_HOST, _MODE_DISKS = 0.1, (0.1, 0.3)  # shares of the unique trace blocks
_LONGEST_REPLAY = 400_000  # trace blocks of all requests; six replays of more take minutes


@dataclass(frozen=True)
class ModeHits:
    """Hit tokens / input tokens of a write mode, by tier; sizes in trace blocks."""

    write: str
    host_blocks: int
    disk_blocks: int
    host_rate: float
    disk_rate: float


@dataclass(frozen=True, eq=False)
class Study:
    trace: Trace
    stack: StackProfile
    curves: dict[Window, HitCurve]  # LRU, trace blocks as recorded
    sizes: list[int]  # capacities of the policy runs in trace blocks
    rows: dict[Window, list[Row]]  # every policy, Belady and LRU at these sizes
    chunk_curves: dict[int, HitCurve]  # LRU by chunk size, full chunks only; this and what follows in the window SHOWN
    ttls_s: list[float]
    ttl_rates: Float64  # (ttls, sizes) token hit rate
    tier_sizes: list[int]
    tier_rates: Float64  # (host sizes, disk sizes) token hit rate of both together with write: through
    sizings: list[Sizing]  # for TARGETS of the hits of an unlimited cache; empty if it has none
    modes: list[ModeHits]  # hits by write mode at a few sizes; empty if it was not asked for, or the trace is too long
    priced: list[TierPoint]  # host only, one for each size; empty without a cost model

    def best(self, window: Window, size: int) -> Row:
        """The row with the most hits among the policies, which do not know the future as Belady does."""
        rows = [row for row in self.rows[window] if row.capacity_blocks == size and row.policy != BOUND]
        return max(rows, key=lambda row: row.hit_tokens)


def make_study(
    trace: Trace,
    policies: Sequence[str] = (),
    num_sizes: int = 20,
    cost: CostModel | None = None,
    token_bytes: int = 0,
    modes: bool = False,
) -> Study:
    """Compute the study. `policies` are replayed; none means all. With `modes`, the write modes are replayed too.

    With token_bytes, or if the trace or the cost model states them, sizes are shown in bytes. Raises TraceError for a trace without trace
    blocks.
    """
    require_blocks(trace)
    if known := known_token_bytes(trace, token_bytes, cost):
        trace = replace(trace, block_bytes=known * trace.block_tokens)
    stack = profile(trace)
    curves = {window: hit_curve(stack, window) for window in WINDOWS}
    sizes = _spread(trace.num_unique, num_sizes)
    names = [name for name in policies or sorted(POLICIES) if name not in ("lru", BOUND)]
    rows = _policy_rows(trace, names, sizes, curves)
    chunk_curves = {}
    for factor in _CHUNK_FACTORS:
        if trace.block_tokens * factor <= trace.input_tokens.max():
            chunked = coarsen(trace, trace.block_tokens * factor)
            chunk_curves[chunked.block_tokens] = hit_curve(profile(chunked), SHOWN)
    duration = float(trace.timestamps_s[-1] - trace.timestamps_s[0])
    ttls_s = [ttl_s for ttl_s in _TTLS_S if ttl_s < duration or ttl_s == float("inf")]
    plane = projections.ttl_plane(stack, ttls_s, sizes, SHOWN)
    tier_sizes = _spread(trace.num_unique, _GRID)
    total = max(curves[SHOWN].total_tokens, 1)
    both = [[curves[SHOWN].at(max(host, disk))[1] / total for disk in tier_sizes] for host in tier_sizes]
    return Study(
        trace,
        stack,
        curves,
        sizes,
        rows,
        chunk_curves,
        ttls_s,
        np.array([[tokens / total for _, tokens in row] for row in plane]),
        tier_sizes,
        np.array(both),
        _sizings(trace, cost),
        mode_hits(trace) if modes and trace.num_blocks <= _LONGEST_REPLAY else [],
        [] if cost is None else tier_grid(stack, {"host": [0, *sizes]}, SHOWN, cost=cost),
    )


def _sizings(trace: Trace, cost: CostModel | None) -> list[Sizing]:
    sizer = Sizer(trace)
    return [sizer.size(share * sizer.ceiling, cost) for share in TARGETS] if sizer.ceiling > 0 else []


def mode_hits(trace: Trace) -> list[ModeHits]:
    """Replays the live cache's own directory in each write mode, with a disk as large as the host and one that is larger."""
    chunked = coarsen(trace, trace.block_tokens)  # the live cache keeps full chunks only
    host, *disks = (max(1, int(share * trace.num_unique)) for share in (_MODE_HOST, *_MODE_DISKS))
    found = []
    for disk in disks:
        for write in ("through", "around", "back"):
            config = CacheConfig.model_validate(
                {
                    "write": write,
                    "host": {"capacity": host},
                    "disk": {"path": "replayed", "capacity": disk * stored_bytes(1)},
                }
            )
            result = replay_fleet(chunked, config, 1, Fleet())
            hits = result.hits(SHOWN)
            total = max(result.total_tokens(SHOWN), 1)
            found.append(ModeHits(write, host, disk, hits["host"] / total, hits["disk"] / total))
    return found


def _policy_rows(
    trace: Trace, names: Sequence[str], sizes: Sequence[int], curves: dict[Window, HitCurve]
) -> dict[Window, list[Row]]:
    """Policies run one after the other and their sizes in parallel, so that the kernel of a policy is compiled once."""
    rows: dict[Window, list[Row]] = {window: [] for window in WINDOWS}
    for window in WINDOWS:
        rows[window] += [_row("lru", trace, size, *curves[window].at(size), curves[window]) for size in sizes]
    for name in [*names, BOUND]:
        for result in replay_named(trace, name, sizes):
            for window in WINDOWS:
                blocks, tokens = result.hit_blocks(trace, window), result.hit_tokens(trace, window)
                rows[window].append(_row(name, trace, result.capacity, blocks, tokens, curves[window]))
    return rows


def _row(policy: str, trace: Trace, size: int, blocks: int, tokens: int, curve: HitCurve) -> Row:
    return Row(policy, trace.block_tokens, size, blocks, curve.total_blocks, tokens, curve.total_tokens)


def _spread(largest: int, count: int) -> list[int]:
    """Sizes from a thousandth of the unique trace blocks to all of them, evenly on a log scale."""
    smallest = max(1, largest // 1000)
    return sorted({round(float(size)) for size in np.geomspace(smallest, largest, count)})
