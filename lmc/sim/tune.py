"""Searches chunk size, policy, tier sizes and TTL within a budget: the second quarter of the trace chooses, the second half judges.

The first quarter only warms the cache up, because a cache that starts empty seems to need less room than a running one. The search takes
four steps, so that long traces take little time:
1. The chunk size is chosen with LRU at the budget. It is the largest whose hits are within _CHUNK_SLACK of the best, because larger chunks
   need fewer copies.
2. The policy is chosen at the budget. It is the best one if that beats LRU in both quarters and by more than chance, else LRU.
3. The sizes are chosen on a ladder below the budget. With prices the point with the least cost per token wins, else the cheapest one
   within _SIZE_SLACK of the best, in hits and in hits of the host.
4. The TTL: take the shortest in _TTLS_S that loses at most _TTL_SLACK of the hits, then use the next longer one.
Lower tiers see every touch (write: through). lmc.sim.full_replay can check the result with the real directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmc.cache.policy import POLICIES
from lmc.errors import ConfigError
from lmc.sim.bootstrap import Interval, share_interval
from lmc.sim.capacity import warn_small
from lmc.sim.cost import CostModel
from lmc.sim.policies import replay_named
from lmc.sim.policy_replay import PLAIN, ReplayOptions
from lmc.sim.sessions import sessions_of
from lmc.sim.stack import StackProfile, profile, request_hits
from lmc.sim.tier_grid import Worth, worth_of
from lmc.sim.trace import Int64, Trace, coarsen, require_blocks
from lmc.units import format_size, parse_size

ASSUMED_TOKEN_BYTES = 128 * 1024
_CHUNK_FACTORS = (1, 2, 4, 8)
_LADDER = (1.0, 0.75, 0.5, 0.25, 0.125)
_TTLS_S = (60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 24 * 3600.0)
_CHUNK_SLACK = 0.002
_SIZE_SLACK = 0.002
_TTL_SLACK = 0.0005
_REGRET = 0.01


@dataclass(frozen=True)
class Budget:
    """The limits of the search: bytes over all ranks, and dollars per hour for both tiers by the prices of the cost model."""

    host_bytes: int
    disk_bytes: int = 0
    dollars_per_hour: float | None = None


@dataclass(frozen=True)
class Point:
    """A configuration and its hit rates (hit tokens / all input tokens)."""

    chunk_tokens: int
    policy: str
    host_bytes: int
    disk_bytes: int
    ttl_s: float | None
    tuning_hit_rate: float = 0.0  # second quarter, which chose
    tuning_host_rate: float = 0.0  # the part of it that the host serves
    hit_rate: float = 0.0  # second half, which judges
    tuning_dollars: float | None = None  # per million input tokens, second quarter; None without prices
    dollars_per_million: float | None = None  # the same, second half
    ttft_s: dict[int, float] | None = None  # by percentile, second half


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


def make_budget(memory: str, disk: str, dollars_per_hour: float | None, cost: CostModel | None) -> Budget:
    """Raises ConfigError for sizes that cannot be parsed, and for a limit in dollars without prices."""
    if dollars_per_hour is not None and cost is None:
        raise ConfigError("--dollars-per-hour needs prices; give --cost with dollars_per_gib_hour for its tiers")
    return Budget(parse_size(memory), 0 if disk == "0" else parse_size(disk), dollars_per_hour)


def tune(
    trace: Trace, token_bytes: int, budget: Budget, policies: Sequence[str] = (), cost: CostModel | None = None
) -> Tuned:
    """Run the search. If token_bytes is 0, they are not known: ASSUMED_TOKEN_BYTES are used and a note says so.

    Raises ConfigError if the budget holds no chunk or the trace is too short to be divided.
    """
    require_blocks(trace)
    if trace.num_requests < 8:
        raise ConfigError(f"{trace.source}: {trace.num_requests} requests are too few to tune on; record more")
    token_bytes, known = token_bytes or ASSUMED_TOKEN_BYTES, token_bytes > 0
    search = _Search(trace, token_bytes, budget, list(policies or sorted(POLICIES)), cost)
    chunk = search.choose_chunk()
    points = search.ladder(chunk, search.choose_policy(chunk))
    sized = search.choose_size(points)
    chosen = search.with_ttl(sized)
    judging = search.judging
    inputs, sessions = trace.input_tokens[judging], search.sessions[judging]
    hits = search.hits(chosen)[judging]
    plain = search.hits(Point(chunk, "lru", chosen.host_bytes, chosen.disk_bytes, None))[judging]
    unlimited = search.tokens(chunk, request_hits(search.stacks[chunk], np.inf))[judging]
    notes = list(trace.notes)
    if not known:
        notes.append(
            f"neither the trace nor an option says how many bytes the KV of a token has, so {format_size(token_bytes)} are assumed, as for "
            "an 8B model with grouped-query attention in 16 bits; give --token-bytes for another model"
        )
    if not search.sessions_named:
        notes.append(
            "the trace names no sessions; intervals are drawn over conversations inferred from growing prompts"
        )
    notes += warn_small(trace, [chosen.host_bytes / (token_bytes * trace.block_tokens)])
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
        _front(points),
        search.tried,
        tuple(notes),
    )


class _Search:
    """Runs configurations and remembers their hits."""

    def __init__(
        self, trace: Trace, token_bytes: int, budget: Budget, policies: list[str], cost: CostModel | None
    ) -> None:
        self.trace = trace
        self.token_bytes = token_bytes
        self.budget = budget
        self.policies = policies
        self.cost = cost
        count = trace.num_requests
        self.tuning, self.judging = slice(count // 4, count // 2), slice(count // 2, count)
        self.sessions, self.sessions_named = sessions_of(profile(trace))
        self.tried: list[Point] = []
        self.stacks: dict[int, StackProfile] = {}
        self._runs: dict[tuple[int, str, int, float | None], Int64] = {}

    def choose_chunk(self) -> int:
        longest = int(self.trace.input_tokens.max())
        sizes = [self.trace.block_tokens * factor for factor in _CHUNK_FACTORS]
        for size in sizes:
            if size <= longest and size * self.token_bytes <= self.budget.host_bytes:
                self.stacks[size] = profile(coarsen(self.trace, size))
        if not self.stacks:
            raise ConfigError(
                f"{self.budget.host_bytes} bytes of memory hold no chunk of {sizes[0]} tokens "
                f"({sizes[0] * self.token_bytes} bytes); raise --memory"
            )
        points = [self.point(size, "lru", self.budget.host_bytes, self.budget.disk_bytes) for size in self.stacks]
        best = max(point.tuning_hit_rate for point in points)
        return max(point.chunk_tokens for point in points if point.tuning_hit_rate >= best - _CHUNK_SLACK)

    def choose_policy(self, chunk: int) -> str:
        """The best policy that beats LRU in both quarters of the first half and by more than chance, else "lru"."""
        host, disk = self.budget.host_bytes, self.budget.disk_bytes
        plain = self.hits(Point(chunk, "lru", host, disk, None))
        points = [self.point(chunk, name, host, disk) for name in self.policies]
        inputs, tuning = self.trace.input_tokens, self.tuning
        for point in sorted(points, key=lambda point: -point.tuning_hit_rate):
            gain = self.hits(point) - plain
            if min(gain[: tuning.start].sum(), gain[tuning].sum()) <= 0:
                continue
            if share_interval(gain[tuning], inputs[tuning], self.sessions[tuning]).low > 0:
                return point.policy
        return "lru"

    def choose_size(self, points: list[Point]) -> Point:
        if self.cost is not None and self.cost.gpu_dollars_per_hour > 0:
            return min(points, key=lambda point: (point.tuning_dollars or 0.0, self._price(point)))
        best = max(point.tuning_hit_rate for point in points)
        points = [point for point in points if point.tuning_hit_rate >= best - _SIZE_SLACK]
        best = max(point.tuning_host_rate for point in points)
        points = [point for point in points if point.tuning_host_rate >= best - _SIZE_SLACK]
        return min(points, key=lambda point: (self._price(point), -point.tuning_hit_rate))

    def ladder(self, chunk: int, policy: str) -> list[Point]:
        hosts = self._rungs(self.budget.host_bytes, chunk)
        disks = [*self._rungs(self.budget.disk_bytes, chunk), 0]
        most = self.budget.dollars_per_hour
        allowed = [(host, disk) for host in hosts for disk in disks if most is None or self._rent(host, disk) <= most]
        if not allowed:
            raise ConfigError(
                f"no tier size fits {most} dollars per hour: the smallest here, {hosts[-1]} bytes of memory, costs "
                f"{self._rent(hosts[-1], 0):.4g}; raise --dollars-per-hour"
            )
        return [self.point(chunk, name, host, disk) for name in sorted({policy, "lru"}) for host, disk in allowed]

    def with_ttl(self, point: Point) -> Point:
        """The point with the TTL of step 4, or without one if the trace is too short to judge."""
        seen_s = float(self.trace.timestamps_s[self.trace.num_requests // 2] - self.trace.timestamps_s[0])
        enough = False
        for ttl_s in _TTLS_S:
            if ttl_s * 4 > seen_s:  # there are too few gaps of that length to judge
                break
            bound = self.point(point.chunk_tokens, point.policy, point.host_bytes, point.disk_bytes, ttl_s)
            if enough:
                return bound
            enough = bound.tuning_hit_rate >= point.tuning_hit_rate - _TTL_SLACK
        return point

    def point(self, chunk: int, policy: str, host_bytes: int, disk_bytes: int, ttl_s: float | None = None) -> Point:
        bare = Point(chunk, policy, host_bytes, disk_bytes, ttl_s)
        for point in self.tried:
            if (point.chunk_tokens, point.policy, point.host_bytes, point.disk_bytes, point.ttl_s) == (
                chunk, policy, host_bytes, disk_bytes, ttl_s,
            ):  # fmt: skip
                return point
        inputs, tuning, judging = self.trace.input_tokens, self.tuning, self.judging
        host, both = self._by_tier(bare)
        rates = [
            float(tokens[part].sum() / max(inputs[part].sum(), 1))
            for tokens, part in ((both, tuning), (host, tuning), (both, judging))
        ]
        point = replace(bare, tuning_hit_rate=rates[0], tuning_host_rate=rates[1], hit_rate=rates[2])
        if self.cost is not None:
            first, second = self._worth(bare, tuning), self._worth(bare, judging)
            priced = self.cost.gpu_dollars_per_hour > 0
            point = replace(
                point,
                tuning_dollars=first.dollars_per_million if priced else None,
                dollars_per_million=second.dollars_per_million if priced else None,
                ttft_s=second.ttft_s,
            )
        self.tried.append(point)
        return point

    def hits(self, point: Point) -> Int64:
        """(num_requests,) hit tokens."""
        return self._by_tier(point)[1]

    def _by_tier(self, point: Point) -> tuple[Int64, Int64]:
        """(num_requests,) hit tokens in the host, and in both tiers: the longer of the two prefixes, because the disk sees every touch."""
        size = point.chunk_tokens * self.token_bytes
        host = self._run(point.chunk_tokens, point.policy, point.host_bytes // size, point.ttl_s)
        both = host
        if point.disk_bytes >= size:
            both = np.maximum(host, self._run(point.chunk_tokens, point.policy, point.disk_bytes // size, point.ttl_s))
        return self.tokens(point.chunk_tokens, host), self.tokens(point.chunk_tokens, both)

    def _worth(self, point: Point, part: slice) -> Worth:
        assert self.cost is not None
        host, both = self._by_tier(point)
        loaded = {"host": host[part]}
        sizes = {"host": point.host_bytes}
        if point.disk_bytes:
            loaded["disk"] = (both - host)[part]
            sizes["disk"] = point.disk_bytes
        return worth_of(self.trace, self.cost, sizes, loaded, part)

    def _price(self, point: Point) -> tuple[float, int, int]:
        return self._rent(point.host_bytes, point.disk_bytes), point.host_bytes, point.disk_bytes

    def _rent(self, host_bytes: int, disk_bytes: int) -> float:
        """Dollars per hour; 0 without prices."""
        sizes = {"host": host_bytes, "disk": disk_bytes}
        return 0.0 if self.cost is None else self.cost.rent({name: size for name, size in sizes.items() if size}, 1.0)

    def tokens(self, chunk: int, blocks: Int64) -> Int64:
        """Hit tokens as in the live cache, which never loads the chunk that holds the last token of a prompt."""
        loaded: Int64 = np.minimum(blocks, np.maximum(self.trace.input_tokens - 1, 0) // chunk)
        return loaded * chunk

    def _run(self, chunk: int, policy: str, capacity: int, ttl_s: float | None) -> Int64:
        key = chunk, policy, capacity, ttl_s
        if key not in self._runs:
            stack = self.stacks[chunk]
            if policy == "lru":
                self._runs[key] = request_hits(stack, capacity, np.inf if ttl_s is None else ttl_s)
            else:
                options = PLAIN if ttl_s is None else ReplayOptions(ttl_s=ttl_s)
                self._runs[key] = replay_named(stack.trace, policy, [capacity], options)[0].request_hits.astype(
                    np.int64
                )
        return self._runs[key]

    def _rungs(self, most: int, chunk: int) -> list[int]:
        """Sizes on the ladder below a budget, or below the size of all unique chunks if that is less; largest first, in whole chunks."""
        size = chunk * self.token_bytes
        largest = min(most // size, self.stacks[chunk].trace.num_unique)
        counts = {int(largest * share) for share in _LADDER} - {0}
        return sorted((count * size for count in counts), reverse=True)


def _front(points: list[Point]) -> list[Point]:
    """The points, smallest first, that no other one beats: with no larger tier and no fewer hits, in both tiers and in the host."""

    def merits(point: Point) -> tuple[float, ...]:
        return -point.host_bytes, -point.disk_bytes, point.tuning_hit_rate, point.tuning_host_rate

    def beaten(point: Point) -> bool:
        mine = merits(point)
        return any(
            all(a >= b for a, b in zip(merits(other), mine, strict=True)) and merits(other) != mine for other in points
        )

    return sorted(
        (point for point in points if not beaten(point)), key=lambda point: (point.host_bytes, point.disk_bytes)
    )
