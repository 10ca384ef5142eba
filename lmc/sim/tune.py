"""Searches the settings within a budget: the second quarter of the trace chooses, the second half judges.

The first quarter only warms the cache up, because a cache that starts empty seems to need less room than a running one. The search takes
six steps, so that long traces take little time:
1. The chunk size is chosen with LRU at the budget. It is the largest whose hits are surely within _CHUNK_SLACK of the best in both
   quarters, because larger chunks need fewer copies.
2. The policy is chosen at the budget. It is the best one if that beats LRU in both quarters and by more than chance, else LRU.
3. The sizes are chosen on a ladder below the budget. With prices the point with the least cost per token wins, else the cheapest one
   within _SIZE_SLACK of the best, in hits and in hits of the host. Fewer than _FEW requests are no reason to leave memory unused.
4. The TTL: take the shortest in _TTLS_S that loses at most _TTL_SLACK of the hits, then use the next longer one.
5. The write mode, and after how many touches a chunk is admitted below the host: through, unless another one is better in both quarters and
   by more than chance. The modes are replayed with the live cache's own directory.
6. With a cost model, min_load_tokens: the number with the least mean time to first token.
Steps 1 to 4 take lower tiers to see every touch (write: through). The choice is judged by a replay with the live cache's own directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmc.cache.policy import POLICIES
from lmc.errors import ConfigError
from lmc.sim.bootstrap import Interval, share_interval
from lmc.sim.capacity import warn_small
from lmc.sim.compression import NO_CODEC, Codec, where_it_pays
from lmc.sim.cost import CostModel
from lmc.sim.sessions import INFERRED
from lmc.sim.stack import request_hits
from lmc.sim.trace import Trace, require_blocks
from lmc.sim.tune_search import Budget, Point, Search
from lmc.units import format_size, parse_size

ASSUMED_TOKEN_BYTES = 128 * 1024
_REGRET = 0.01
_GIVEN_UP = 0.0005  # less than this is not worth a note


@dataclass(frozen=True)
class Tuned:
    trace: Trace
    token_bytes: int  # KV bytes per token over all ranks
    chosen: Point
    expected: Interval  # hit rate of the chosen point on the second half
    over_lru: Interval  # its hit rate minus that of LRU in the same sizes
    ceiling: float  # unlimited cache, second half, same chunk size
    front: list[Point]
    tried: list[Point]
    notes: tuple[str, ...]
    compress: str = "none"  # of the disk


def make_budget(memory: str, disk: str, dollars_per_hour: float | None, cost: CostModel | None) -> Budget:
    """Raises ConfigError for sizes that cannot be parsed, and for a limit in dollars without prices."""
    if dollars_per_hour is not None and cost is None:
        raise ConfigError("--dollars-per-hour needs prices; give --cost with dollars_per_gib_hour for its tiers")
    return Budget(parse_size(memory), 0 if disk == "0" else parse_size(disk), dollars_per_hour)


def tune(
    trace: Trace,
    token_bytes: int,
    budget: Budget,
    policies: Sequence[str] = (),
    cost: CostModel | None = None,
    codec: Codec = NO_CODEC,
) -> Tuned:
    """Run the search. If token_bytes is 0, they are not known: ASSUMED_TOKEN_BYTES are used and a note says so. codec: of the disk.

    Raises ConfigError if the budget holds no chunk or the trace is too short to be divided.
    """
    require_blocks(trace)
    if trace.num_requests < 8:
        raise ConfigError(f"{trace.source}: {trace.num_requests} requests are too few to tune on; record more")
    token_bytes, known = token_bytes or ASSUMED_TOKEN_BYTES, token_bytes > 0
    search = Search(trace, token_bytes, budget, list(policies or sorted(POLICIES)), cost, codec)
    chunk = search.choose_chunk()
    points = search.ladder(chunk, search.choose_policy(chunk))
    sized = search.choose_size(points)
    written = search.with_write_mode(search.with_ttl(sized))
    chosen = search.with_min_load(written)
    judging = search.judging
    inputs, sessions = trace.input_tokens[judging], search.sessions[judging]
    hits = search.replayed(chosen)[judging]
    chosen = replace(chosen, hit_rate=float(hits.sum() / max(inputs.sum(), 1)))
    plain = search.replayed(Point(chunk, "lru", chosen.host_bytes, chosen.disk_bytes, None))[judging]
    stack = search.stacks[chunk]
    unlimited = stack.trace.loaded_tokens(request_hits(stack, np.inf))[judging]
    notes = list(trace.notes)
    if not known:
        notes.append(assumed_note())
    if not search.sessions_named:
        notes.append(INFERRED)
    notes += warn_small(trace, [chosen.host_bytes / (token_bytes * trace.block_tokens)])
    notes += search.notes
    notes += _given_up(search, written, sized)
    if codec != NO_CODEC:
        notes += where_it_pays(cost, codec)
    missed = max(points, key=lambda point: point.hit_rate)
    if missed.hit_rate > sized.hit_rate + _REGRET and chosen.dollars_per_million is None:
        notes.append(
            f"the second half would have hit {missed.hit_rate * 100:.1f} % with {missed.policy}, {format_size(missed.host_bytes)} of host "
            f"and {format_size(missed.disk_bytes)} of disk, because the workload was still growing; tune on a longer trace"
        )
    return Tuned(
        trace,
        token_bytes,
        chosen,
        share_interval(hits, inputs, sessions),
        share_interval(hits - plain, inputs, sessions),
        float(unlimited.sum() / inputs.sum()),
        _front([point for point in points if _sizes(point) != _sizes(chosen)], chosen),
        search.tried,
        tuple(notes),
        search.compress,
    )


def assumed_note() -> str:
    return (
        f"neither the trace nor an option says how many bytes the KV of a token has, so {format_size(ASSUMED_TOKEN_BYTES)} are assumed, as "
        "for an 8B model with grouped-query attention in 16 bits; give --token-bytes for another model"
    )


def _given_up(search: Search, written: Point, sized: Point) -> list[str]:
    """What the choices cost on the second half, which had no say: notes on chunk size, tier sizes and write mode.

    written: the chosen point before step 6, as the others are. sized: that of step 3.
    """
    notes = []

    def compare(what: str, mine: Point, others: list[Point], name: Callable[[Point], str]) -> None:
        best = max(others, key=lambda point: point.hit_rate, default=mine)
        lost = best.hit_rate - mine.hit_rate
        if lost > _GIVEN_UP:
            notes.append(f"{what} gave up {100 * lost:.2f} points on the second half against {name(best)}")

    by_chunk = search.by_chunk
    compare(
        f"chunks of {written.chunk_tokens} tokens",
        by_chunk[written.chunk_tokens],
        list(by_chunk.values()),
        lambda point: f"{point.chunk_tokens} tokens",
    )
    same = [point for point in search.tried if (point.chunk_tokens, point.policy) == (sized.chunk_tokens, sized.policy)]
    plain = [point for point in same if point.write == "through" and point.ttl_s is None]
    if _sizes(written) == _sizes(sized):
        compare(
            "smaller tiers",
            sized,
            plain,
            lambda point: f"{format_size(point.host_bytes)} of host and {format_size(point.disk_bytes)} of disk",
        )
    modes = [point for point in same if point.write != "through" and _sizes(point) == _sizes(written)]
    compare(
        f"write: {written.write}", written, modes, lambda point: f"{point.write} after {point.write_touches} touches"
    )
    return notes


def _sizes(point: Point) -> tuple[int, str, int, int]:
    return point.chunk_tokens, point.policy, point.host_bytes, point.disk_bytes


def _front(points: list[Point], chosen: Point) -> list[Point]:
    """The chosen point and those that no other beats, smallest first: with no larger tier and no fewer hits, in both and in the host."""

    def merits(point: Point) -> tuple[float, ...]:
        return -point.host_bytes, -point.disk_bytes, point.tuning_hit_rate, point.tuning_host_rate

    def beaten(point: Point) -> bool:
        mine = merits(point)
        return any(
            all(a >= b for a, b in zip(merits(other), mine, strict=True)) and merits(other) != mine
            for other in [*points, chosen]
        )

    front = [chosen, *(point for point in points if not beaten(point))]
    return sorted(front, key=lambda point: (point.host_bytes, point.disk_bytes))
