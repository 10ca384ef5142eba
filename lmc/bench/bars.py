"""Judges the bars of a workload: bounds on the ratio of two arms over some of the requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lmc.bench.records import BarResult, RequestRecord
from lmc.bench.stats import pairs
from lmc.bench.workload import Bar


def judge_bars(bars: Sequence[Bar], records: Mapping[str, Sequence[RequestRecord]]) -> list[BarResult]:
    """The result of every bar whose two arms ran."""
    return [_judge(bar, records[bar.a], records[bar.b]) for bar in bars if bar.a in records and bar.b in records]


def _judge(bar: Bar, a: Sequence[RequestRecord], b: Sequence[RequestRecord]) -> BarResult:
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
    ratio = _figure(bar.metric, left) / _figure(bar.metric, right)
    met = (bar.at_most is None or ratio <= bar.at_most) and (bar.at_least is None or ratio >= bar.at_least)
    return BarResult(text, ratio, met, min(len(left), len(right)))


def _covers(over: str, record: RequestRecord) -> bool:
    if over == "hits":
        return bool(record.cached_tokens)
    return over in ("all", record.part)


def _figure(metric: str, records: Sequence[RequestRecord]) -> float:
    if metric == "ttft_p50":
        return float(np.median([record.ttft_ms or np.nan for record in records]))
    tokens = sum(record.prompt_tokens + record.output_tokens for record in records)
    return tokens / sum((record.e2e_ms or np.nan) / 1e3 for record in records)
