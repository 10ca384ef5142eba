"""Is arm a better than arm b? Paired by request, bootstrapped over sessions, with three answers: better, worse, undecided.

Requests of one session depend on each other, so a resample draws whole sessions (Efron & Tibshirani 1993, block bootstrap), the
same ones for both arms. A verdict needs the whole interval beyond `margin`; a p99 needs 500 samples, a p90 50.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lmc.bench.records import Comparison, RequestRecord

Floats = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95
MARGIN = 0.03
MIN_SESSIONS = 5
MIN_SAMPLES = {50: 1, 90: 50, 99: 500}
LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")
Pair = tuple[RequestRecord, RequestRecord]


def pairs(a: Sequence[RequestRecord], b: Sequence[RequestRecord]) -> list[Pair]:
    """Requests that both arms answered, in a's order."""
    answered = {(record.repeat, record.request_id): record for record in b if record.ok}
    return [
        (record, answered[record.repeat, record.request_id])
        for record in a
        if record.ok and (record.repeat, record.request_id) in answered
    ]


def compare(name_a: str, name_b: str, matched: Sequence[Pair], seed: int, is_ordered: bool) -> list[Comparison]:
    """Ratios a / b of latency percentiles, and of throughput where one request ran at a time."""
    found: list[Comparison] = []
    if not matched:
        return found
    for metric in LATENCIES:
        values = [(getattr(x, metric), getattr(y, metric), x) for x, y in matched]
        usable = [item for item in values if item[0] is not None and item[1] is not None]
        for percentile, needed in MIN_SAMPLES.items():
            if len(usable) >= max(needed, 1):
                left, right = (np.array([item[side] for item in usable], dtype=np.float64) for side in (0, 1))
                draws = Draws([(item[2].repeat, item[2].session) for item in usable], seed)
                point, low, high = draws.ratio(left, right, partial(_percentile, percentile=percentile))
                verdict = judge(low, high, True, draws.num_sessions)
                label = f"{metric.removesuffix('_ms')}_p{percentile}"
                found.append(Comparison(name_a, name_b, label, point, low, high, verdict, len(usable)))
    if is_ordered:
        tokens = np.array([x.prompt_tokens + x.output_tokens for x, _ in matched], dtype=np.float64)
        speed_a, speed_b = (np.array([pair[side].e2e_ms or 0.0 for pair in matched]) for side in (0, 1))
        draws = Draws([(x.repeat, x.session) for x, _ in matched], seed)
        point, low, high = draws.ratio(
            np.stack([tokens, speed_a]), np.stack([tokens, speed_b]), lambda x: float(x[0].sum() / x[1].sum())
        )
        verdict = judge(low, high, False, draws.num_sessions)
        found.append(Comparison(name_a, name_b, "throughput", point, low, high, verdict, len(matched)))
    return found


def _percentile(values: Floats, percentile: int) -> float:
    return float(np.percentile(values, percentile))


class Draws:
    """Resamples of sessions, the same for both arms: each draw is the indices of the requests of the drawn sessions."""

    def __init__(self, sessions: Sequence[tuple[int, str]], seed: int) -> None:
        members: dict[tuple[int, str], list[int]] = {}
        for index, session in enumerate(sessions):
            members.setdefault(session, []).append(index)
        self._groups = [np.array(group) for group in members.values()]
        self._rng = np.random.default_rng([seed, 0xB007])

    @property
    def num_sessions(self) -> int:
        return len(self._groups)

    def ratio(self, a: Floats, b: Floats, figure: Callable[[Floats], float]) -> tuple[float, float, float]:
        """figure(a) / figure(b) and its interval; the last axis of both arrays is the request."""
        ratios = np.empty(RESAMPLES)
        count = len(self._groups)
        for draw, picks in enumerate(self._rng.integers(0, count, size=(RESAMPLES, count))):
            chosen = np.concatenate([self._groups[pick] for pick in picks])
            ratios[draw] = figure(a[..., chosen]) / figure(b[..., chosen])
        low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return figure(a) / figure(b), float(low), float(high)


def judge(low: float, high: float, lower_is_better: bool, num_sessions: int) -> str:
    """The verdict about a, from the interval of a / b."""
    if num_sessions < MIN_SESSIONS:
        return "undecided"
    if high < 1 - MARGIN:
        return "better" if lower_is_better else "worse"
    if low > 1 + MARGIN:
        return "worse" if lower_is_better else "better"
    return "undecided"
