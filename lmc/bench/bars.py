"""Judges the bars of a workload: bounds on the ratio of two arms over some of the requests.

A bar is met, or not met, if the whole interval of its ratio is; otherwise, and with too few sessions for an interval, it is undecided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from lmc.bench.records import BarResult, RequestRecord, Results
from lmc.bench.stats import MIN_SESSIONS, Draws, Floats, pairs, weighted_percentile
from lmc.bench.workload import Bar


def judge_bars(bars: Sequence[Bar], records: Mapping[str, Sequence[RequestRecord]], seed: int) -> list[BarResult]:
    """The result of every bar whose two arms ran."""
    return [_judge(bar, records[bar.a], records[bar.b], seed) for bar in bars if bar.a in records and bar.b in records]


def judged_again(results: Results, records: Sequence[RequestRecord]) -> Results:
    """The results with bars that are judged as they are now: those of an older run may have no interval."""
    by_arm: dict[str, list[RequestRecord]] = {}
    for record in records:
        by_arm.setdefault(record.arm, []).append(record)
    bars = [Bar.model_validate(bar) for bar in results.workload["bars"]]
    return replace(results, bars=judge_bars(bars, by_arm, results.workload["seed"]))


def _judge(bar: Bar, a: Sequence[RequestRecord], b: Sequence[RequestRecord], seed: int) -> BarResult:
    over = {"all": "all requests", "hits": f"requests with a hit on {bar.a}"}.get(bar.over, f"part {bar.over}")
    if bar.against is None:
        chosen = [pair for pair in pairs(a, b) if _covers(bar.over, pair[0])]
        left, right = [first for first, _ in chosen], [second for _, second in chosen]
    else:
        over += f" against part {bar.against}"
        left = [record for record in a if record.ok and _covers(bar.over, record)]
        right = [record for record in b if record.ok and record.part == bar.against]
    bound = f"<= {bar.at_most:g}" if bar.at_most is not None else f">= {bar.at_least:g}" if bar.at_least else ""
    text = f"{bar.metric} of {bar.a} / {bar.b} over {over} {bound}".strip()
    if not left or not right:
        return BarResult(text, None, None, 0)
    figure = _ttft_p50 if bar.metric == "ttft_p50" else _throughput
    figures = [partial(figure, *_columns(side)) for side in (left, right)]
    sessions = [[(record.repeat, record.session) for record in side] for side in (left, right)]
    draws = [Draws(sessions[0], seed), Draws(sessions[1], seed if bar.against is None else seed + 1)]
    ratio = draws[0].plain(figures[0]) / draws[1].plain(figures[1])
    samples = min(len(left), len(right))
    if min(draw.num_sessions for draw in draws) < MIN_SESSIONS:
        return BarResult(text, ratio, None, samples)
    low, high = draws[0].bounds_against(draws[1], figures[0], figures[1])
    return BarResult(text, ratio, _verdict(bar, low, high), samples, low, high)


def _verdict(bar: Bar, low: float, high: float) -> bool | None:
    """Of a bar with two bounds, both must hold."""
    held = [high <= bar.at_most if bar.at_most is not None else True, low >= bar.at_least if bar.at_least else True]
    missed = [low > bar.at_most if bar.at_most is not None else False, high < bar.at_least if bar.at_least else False]
    return True if all(held) else False if any(missed) else None


def _covers(over: str, record: RequestRecord) -> bool:
    if over == "hits":
        return bool(record.cached_tokens)
    return over in ("all", record.part)


def _columns(records: Sequence[RequestRecord]) -> tuple[Floats, Floats, Floats]:
    """(TTFT in ms, end to end in ms, tokens) of each record."""
    rows = [(r.ttft_ms or np.nan, r.e2e_ms or np.nan, float(r.prompt_tokens + r.output_tokens)) for r in records]
    ttft, e2e, tokens = np.array(rows, dtype=np.float64).T
    return ttft, e2e, tokens


def _ttft_p50(ttft_ms: Floats, e2e_ms: Floats, tokens: Floats, weights: Floats) -> Floats:
    return weighted_percentile(ttft_ms, weights, 50)


def _throughput(ttft_ms: Floats, e2e_ms: Floats, tokens: Floats, weights: Floats) -> Floats:
    """Tokens per second during which a request ran."""
    rate: Floats = (weights @ tokens) / (weights @ e2e_ms) * 1e3
    return rate
