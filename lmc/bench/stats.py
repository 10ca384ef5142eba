"""Compares arm a with arm b, paired by request, with a bootstrap over sessions. The verdict is better, worse or undecided.

A resample draws whole sessions (lmc.sim.bootstrap), the same ones for both arms. A verdict needs the whole interval beyond MARGIN and
sessions that lean the same way by a two-sided sign test, because a few slow moments of a busy machine move an interval but not most pairs.
A p99 needs 500 samples, a p90 50.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lmc.bench.records import Comparison, RequestRecord
from lmc.sim.bootstrap import LEVEL, bounds, draw_sessions

Floats = NDArray[np.float64]
Figure = Callable[[Floats], Floats]
MARGIN = 0.03
MIN_SESSIONS = 6  # the fewest that a two-sided sign test can decide
MAX_CELLS = 1 << 22  # weights in memory at a time
MIN_SAMPLES = {50: 1, 90: 50, 99: 500}
LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")
Pair = tuple[RequestRecord, RequestRecord]


def pairs(a: Sequence[RequestRecord], b: Sequence[RequestRecord]) -> list[Pair]:
    """The requests that both arms answered, in a's order."""
    answered = {(record.repeat, record.request_id): record for record in b if record.ok}
    return [
        (record, answered[record.repeat, record.request_id])
        for record in a
        if record.ok and (record.repeat, record.request_id) in answered
    ]


def compare(name_a: str, name_b: str, matched: Sequence[Pair], seed: int, is_ordered: bool) -> list[Comparison]:
    """Ratios a / b of latency percentiles, and of throughput where one request ran at a time."""
    found: list[Comparison] = []
    for metric in LATENCIES:
        usable = [(x, y) for x, y in matched if getattr(x, metric) is not None and getattr(y, metric) is not None]
        left, right = (np.array([getattr(pair[side], metric) for pair in usable], dtype=np.float64) for side in (0, 1))
        draws = Draws([(x.repeat, x.session) for x, _ in usable], seed)
        for percentile, needed in MIN_SAMPLES.items():
            if len(usable) >= needed:
                figure = partial(weighted_percentile, percentile=percentile)
                point, low, high = draws.ratio(lambda w, f=figure, x=left, y=right: f(x, w) / f(y, w))  # type: ignore[misc]
                verdict = judge(low, high, True, draws.num_sessions) if draws.lean(left, right) else "undecided"
                label = f"{metric.removesuffix('_ms')}_p{percentile}"
                found.append(Comparison(name_a, name_b, label, point, low, high, verdict, len(usable)))
    if is_ordered and matched:
        tokens = np.array([x.prompt_tokens + x.output_tokens for x, _ in matched], dtype=np.float64)
        busy_a, busy_b = (np.array([pair[side].e2e_ms for pair in matched], dtype=np.float64) for side in (0, 1))
        draws = Draws([(x.repeat, x.session) for x, _ in matched], seed)
        point, low, high = draws.ratio(lambda w: ((w @ tokens) / (w @ busy_a)) / ((w @ tokens) / (w @ busy_b)))
        verdict = judge(low, high, False, draws.num_sessions) if draws.lean(busy_a, busy_b) else "undecided"
        found.append(Comparison(name_a, name_b, "throughput", point, low, high, verdict, len(matched)))
    return found


def compare_groups(name_a: str, name_b: str, matched: Sequence[Pair], seed: int) -> list[Comparison]:
    """The median TTFT over the requests with a hit on a, and over each part, where these are not all requests."""
    groups = {"hits": [pair for pair in matched if pair[0].cached_tokens]}
    for part in dict.fromkeys(first.part for first, _ in matched):
        groups[part] = [pair for pair in matched if pair[0].part == part]
    return [
        replace(comparison, over=over)
        for over, chosen in groups.items()
        if 0 < len(chosen) < len(matched)
        for comparison in compare(name_a, name_b, chosen, seed, is_ordered=False)
        if comparison.metric == "ttft_p50"
    ]


class Draws:
    """Resamples of sessions, the same for both arms. A resample gives each request a weight: how often its session was drawn."""

    def __init__(self, sessions: Sequence[tuple[int, str]], seed: int) -> None:
        codes: dict[tuple[int, str], int] = {}
        self._session = np.array([codes.setdefault(session, len(codes)) for session in sessions], dtype=np.int64)
        self.num_sessions = len(codes)
        self._seed = seed

    def lean(self, a: Floats, b: Floats) -> bool:
        """Whether most sessions differ in one direction, by a sign test on the sum of each session, at the level of the intervals."""
        sums = np.bincount(self._session, weights=a - b, minlength=self.num_sessions)
        wins, count = int((sums < 0).sum()), int((sums != 0).sum())
        rarer: int = sum(math.comb(count, k) for k in range(min(wins, count - wins) + 1))
        return bool(2 * rarer < (1 - LEVEL) * 2**count)

    def plain(self, figure: Figure) -> float:
        """The figure of the sample. `figure` maps weights (resamples, requests) to (resamples,)."""
        return float(figure(np.ones((1, self._session.size)))[0])

    def ratio(self, figure: Figure) -> tuple[float, float, float]:
        """The figure of the sample and its interval."""
        low, high = bounds(self._resampled(figure))
        return self.plain(figure), low, high

    def bounds_against(self, other: Draws, mine: Figure, its: Figure) -> tuple[float, float]:
        """The interval of a figure of this sample divided by one of the other. With the same seed and sessions both draw alike (paired)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return bounds([np.concatenate(self._resampled(mine)) / np.concatenate(other._resampled(its))])

    def _resampled(self, figure: Figure) -> list[Floats]:
        at_once = max(1, MAX_CELLS // max(self._session.size, 1))
        drawn = draw_sessions(self.num_sessions, [self._seed, 0xB007], at_once)
        return [figure(times[:, self._session].astype(np.float64)) for times in drawn]


def weighted_percentile(values: Floats, weights: Floats, percentile: float) -> Floats:
    """np.percentile of `values` (n,), each repeated as often as its weight says; weights are whole numbers (resamples, n)."""
    order = np.argsort(values, kind="stable")
    reach = np.cumsum(weights[:, order], axis=1)
    position = (reach[:, -1] - 1) * (percentile / 100)
    below = np.floor(position)
    first = (reach <= below[:, None]).sum(axis=1)
    second = (reach <= np.minimum(below + 1, reach[:, -1] - 1)[:, None]).sum(axis=1)
    ranked = values[order]
    mixed: Floats = ranked[first] + (ranked[second] - ranked[first]) * (position - below)
    return mixed


def judge(low: float, high: float, lower_is_better: bool, num_sessions: int) -> str:
    """The verdict about a, by the interval of a / b."""
    if num_sessions < MIN_SESSIONS:
        return "undecided"
    if high < 1 - MARGIN:
        return "better" if lower_is_better else "worse"
    if low > 1 + MARGIN:
        return "worse" if lower_is_better else "better"
    return "undecided"
