"""The steps of lmc.sim.tune: runs configurations within a budget, remembers their hits, and chooses among them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmc.cache.config import CacheConfig
from lmc.cache.tiers.format import stored_bytes
from lmc.errors import ConfigError
from lmc.sim.bootstrap import share_interval
from lmc.sim.compression import NO_CODEC, Codec, with_codec
from lmc.sim.cost import CostModel
from lmc.sim.full_replay import Fleet, replay_fleet
from lmc.sim.policies import replay_named
from lmc.sim.policy_replay import PLAIN, ReplayOptions
from lmc.sim.sessions import sessions_of
from lmc.sim.stack import StackProfile, profile, request_hits
from lmc.sim.tier_grid import Worth, worth_of
from lmc.sim.trace import Int64, Trace, coarsen

_CHUNK_FACTORS = (1, 2, 4, 8)
_LADDER = (1.0, 0.75, 0.5, 0.25, 0.125)
_TTLS_S = (60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 24 * 3600.0)
_CHUNK_SLACK = 0.002
_SIZE_SLACK = 0.002
_TTL_SLACK = 0.0005
_FEW = 100  # requests in the quarter that chooses
_LONGEST_REPLAY = 3_000_000  # chunks of all requests; a replay of more takes minutes
WriteMode = Literal["through", "back", "around"]
_WRITES: tuple[tuple[WriteMode, int], ...] = (
    ("through", 2),
    ("back", 2),
    ("around", 2),
    ("around", 3),
)  # mode, touches


@dataclass(frozen=True)
class Budget:
    """The limits of the search: bytes over all ranks, and dollars per hour for both tiers by the prices of the cost model."""

    host_bytes: int
    disk_bytes: int = 0
    dollars_per_hour: float | None = None


@dataclass(frozen=True)
class Point:
    """A configuration and its hit rates (hit tokens / all input tokens). Points are equal where their configurations are."""

    chunk_tokens: int
    policy: str
    host_bytes: int
    disk_bytes: int  # of whole files, as Search.file_bytes has them
    ttl_s: float | None
    write: WriteMode = "through"
    write_touches: int = 2
    min_load_tokens: int = 1
    tuning_hit_rate: float = field(default=0.0, compare=False)  # second quarter, which chose
    tuning_host_rate: float = field(default=0.0, compare=False)  # the part of it that the host serves
    hit_rate: float = field(default=0.0, compare=False)  # second half, which judges
    tuning_dollars: float | None = field(default=None, compare=False)  # per million input tokens, second quarter
    dollars_per_million: float | None = field(default=None, compare=False)  # the same, second half; None without prices
    ttft_s: dict[int, float] | None = field(default=None, compare=False)  # by percentile, second half


def settings_of(point: Point, disk_path: Path, compress: str = "none") -> dict[str, Any]:
    """The settings (lmc.cache.config) of a point, which are replayed and written. Any: YAML."""
    settings: dict[str, Any] = {
        "chunk_tokens": point.chunk_tokens,
        "policy": point.policy,
        "write": point.write,
        "host": {"capacity": point.host_bytes},
    }
    if point.disk_bytes:
        settings["disk"] = {"path": str(disk_path), "capacity": point.disk_bytes}
        if compress != "none":
            settings["disk"]["compress"] = compress
    if point.write == "around":
        settings["write_touches"] = point.write_touches
    if point.min_load_tokens > 1:
        settings["min_load_tokens"] = point.min_load_tokens
    if point.ttl_s is not None:
        settings["ttl"] = point.ttl_s
    return settings


class Search:
    """Runs configurations and remembers their hits."""

    def __init__(
        self,
        trace: Trace,
        token_bytes: int,
        budget: Budget,
        policies: list[str],
        cost: CostModel | None,
        codec: Codec,
    ) -> None:
        self.trace = trace
        self.token_bytes = token_bytes
        self.budget = budget
        self.policies = policies
        self.cost = None if cost is None else with_codec(cost, codec)
        self.codec = codec  # of the disk
        self.compress = "none" if codec == NO_CODEC else "lossless"
        count = trace.num_requests
        self.tuning, self.judging = slice(count // 4, count // 2), slice(count // 2, count)
        self.sessions, self.sessions_named = sessions_of(profile(trace))
        self.tried: list[Point] = []
        self.by_chunk: dict[int, Point] = {}  # with LRU at the budget
        self.notes: list[str] = []
        self._replays: dict[Point, Int64] = {}
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
        points = [self.point(size, "lru", *self._most(size)) for size in self.stacks]
        self.by_chunk = {point.chunk_tokens: point for point in points}
        return max(point.chunk_tokens for point in points if self._costs_little(point, points))

    def _costs_little(self, point: Point, points: list[Point]) -> bool:
        """Whether the chunk size loses at most _CHUNK_SLACK in each quarter of the first half, and beyond chance in the second."""
        best = max(points, key=lambda other: other.tuning_hit_rate)
        if point == best:
            return True
        loss = self.hits(best) - self.hits(point)
        inputs, tuning = self.trace.input_tokens, self.tuning
        first = slice(0, tuning.start)
        if loss[first].sum() > _CHUNK_SLACK * inputs[first].sum():
            return False
        return share_interval(loss[tuning], inputs[tuning], self.sessions[tuning]).high <= _CHUNK_SLACK

    def choose_policy(self, chunk: int) -> str:
        """The best policy that beats LRU in both quarters of the first half and by more than chance, else "lru"."""
        host, disk = self._most(chunk)
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
        if self.tuning.stop - self.tuning.start < _FEW:
            most = max(points, key=lambda point: (point.tuning_hit_rate, point.host_bytes, point.disk_bytes))
            whole = max(points, key=lambda point: (point.policy == most.policy, point.host_bytes, point.disk_bytes))
            self.notes.append(
                f"the quarter that chooses has fewer than {_FEW} requests, too few to leave memory unused, so the whole budget is taken; "
                "record more"
            )
            return self._whole_budget(whole)
        best = max(point.tuning_hit_rate for point in points)
        points = [point for point in points if point.tuning_hit_rate >= best - _SIZE_SLACK]
        best = max(point.tuning_host_rate for point in points)
        points = [point for point in points if point.tuning_host_rate >= best - _SIZE_SLACK]
        return min(points, key=lambda point: (self._price(point), -point.tuning_hit_rate))

    def _whole_budget(self, point: Point) -> Point:
        """The point with tiers of the budget, which are no larger than the trace fills on the ladder."""
        host, disk = self._most(point.chunk_tokens)
        limit = self.budget.dollars_per_hour
        if limit is not None and self._rent(host, disk) > limit:
            return point
        return self.point(point.chunk_tokens, point.policy, host, disk)

    def ladder(self, chunk: int, policy: str) -> list[Point]:
        hosts = self._rungs(self.budget.host_bytes, chunk, chunk * self.token_bytes)
        disks = [*self._rungs(self.budget.disk_bytes, chunk, self.file_bytes(chunk)), 0]
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

    def with_write_mode(self, point: Point) -> Point:
        """The point with the write mode of step 5, and with the whole budget where another mode than through makes use of it."""
        if self.budget.disk_bytes < self.file_bytes(point.chunk_tokens) or not self._can_replay(point):
            return point
        places = [point]
        if self.cost is None or self.cost.gpu_dollars_per_hour == 0:  # else the sizes were chosen by what they cost
            whole = self._whole_budget(point)
            if (whole.host_bytes, whole.disk_bytes) != (point.host_bytes, point.disk_bytes):
                places.append(whole)
        inputs, tuning, judging = self.trace.input_tokens, self.tuning, self.judging
        plain = self.replayed(point)
        found: list[tuple[Point, Int64]] = []
        for place in places:
            modes = _WRITES if place.disk_bytes else _WRITES[:1]
            for write, touches in modes:
                mode = replace(place, ttl_s=point.ttl_s, write=write, write_touches=touches)
                hits = self.replayed(mode)
                rates = [float(hits[part].sum() / max(inputs[part].sum(), 1)) for part in (tuning, judging)]
                found.append((replace(mode, tuning_hit_rate=rates[0], hit_rate=rates[1]), hits))
        self.tried += [mode for mode, _ in found if mode.write != "through"]
        for mode, hits in sorted(found[1:], key=lambda one: -one[0].tuning_hit_rate):
            gain = hits - plain
            larger = (mode.host_bytes, mode.disk_bytes) != (point.host_bytes, point.disk_bytes)
            least = _SIZE_SLACK if larger else 0.0
            if min(gain[: tuning.start].sum(), gain[tuning].sum() - least * inputs[tuning].sum()) <= 0:
                continue
            if share_interval(gain[tuning], inputs[tuning], self.sessions[tuning]).low > 0:
                if mode.write == "back":
                    self.notes.append(
                        "write: back keeps new chunks in host memory only until it evicts them, so a killed engine loses them"
                    )
                return mode
        return found[0][0]

    def with_min_load(self, point: Point) -> Point:
        """The point with the min_load_tokens of step 6."""
        if self.cost is None:
            return point
        names = ["host"] + (["disk"] if point.disk_bytes else [])
        candidates = {1, *(self.cost.break_even_tokens(name) or 1 for name in names)}
        host, both = (tokens[self.tuning] for tokens in self._by_tier(point))
        inputs = self.trace.input_tokens[self.tuning]

        def mean_ttft(least: int) -> float:
            assert self.cost is not None
            loads = {"host": np.where(both >= least, host, 0)}
            if point.disk_bytes:
                loads["disk"] = np.where(both >= least, both - host, 0)
            hits = np.zeros_like(inputs)
            waited = np.zeros(inputs.size)
            for name, tokens in loads.items():
                hits = hits + tokens
                waited = waited + self.cost.tier(name).seconds(tokens * float(self.token_bytes))
            return float((waited + self.cost.prefill.seconds(hits, inputs - hits)).mean())

        return replace(point, min_load_tokens=min(sorted(candidates), key=mean_ttft))

    def replayed(self, point: Point) -> Int64:
        """(num_requests,) hit tokens with the settings of the point, by the live cache's own directory where the trace is short enough,
        else like hits()."""
        if point not in self._replays:
            if not self._can_replay(point):
                return self.hits(point)
            trace = self.stacks[point.chunk_tokens].trace
            size = point.chunk_tokens * self.token_bytes
            config = CacheConfig.model_validate(settings_of(point, Path("replayed"), self.compress))
            result = replay_fleet(trace, config, size, Fleet(codec=self.codec))
            self._replays[point] = np.sum(list(result.hit_tokens.values()), axis=0)
        return self._replays[point]

    def file_bytes(self, chunk: int) -> int:
        """What the disk's capacity counts for a chunk: its KV and the footer of its file."""
        return stored_bytes(chunk * self.token_bytes)

    def _most(self, chunk: int) -> tuple[int, int]:
        """The budget of host and disk in whole chunks."""
        size, file = chunk * self.token_bytes, self.file_bytes(chunk)
        return self.budget.host_bytes // size * size, self.budget.disk_bytes // file * file

    def _can_replay(self, point: Point) -> bool:
        """Whether a replay takes seconds rather than minutes; a note says if not."""
        short = self.stacks[point.chunk_tokens].trace.num_blocks <= _LONGEST_REPLAY
        note = "the trace is too long to replay, so write: through was taken and judged in closed form"
        if not short and note not in self.notes:
            self.notes.append(note)
        return short

    def point(self, chunk: int, policy: str, host_bytes: int, disk_bytes: int, ttl_s: float | None = None) -> Point:
        bare = Point(chunk, policy, host_bytes, disk_bytes, ttl_s)
        for point in self.tried:
            if point == bare:
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
        """(num_requests,) hit tokens with write: through, in closed form."""
        both = self._by_tier(point)[1]
        return np.where(both >= point.min_load_tokens, both, 0)

    def _by_tier(self, point: Point) -> tuple[Int64, Int64]:
        """(num_requests,) hit tokens in the host, and in both tiers: the longer of the two prefixes, because the disk sees every touch."""
        size = point.chunk_tokens * self.token_bytes
        host = self._run(point.chunk_tokens, point.policy, point.host_bytes // size, point.ttl_s)
        both = host
        if point.disk_bytes:
            fit = point.disk_bytes // (self.file_bytes(point.chunk_tokens) - size + self.codec.stored(size))
            both = np.maximum(host, self._run(point.chunk_tokens, point.policy, fit, point.ttl_s))
        trace = self.stacks[point.chunk_tokens].trace
        return trace.loaded_tokens(host), trace.loaded_tokens(both)

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

    def _rungs(self, most: int, chunk: int, size: int) -> list[int]:
        """Sizes on the ladder below a budget, or below the size of all unique chunks if that is less; largest first, in whole chunks.

        size: bytes of a chunk in this tier.
        """
        largest = min(most // size, self.stacks[chunk].trace.num_unique)
        counts = {int(largest * share) for share in _LADDER} - {0}
        return sorted((count * size for count in counts), reverse=True)
