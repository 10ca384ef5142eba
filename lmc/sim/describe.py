"""Describes a trace: sizes, lengths, arrivals, reuse, sharing, and the hits of an unlimited cache by every usual denominator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmc.report import Cell, Column, Table
from lmc.sim import stack
from lmc.sim.sessions import sessions_of
from lmc.sim.trace import Int64, Trace

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Fact:
    name: str  # for programs
    label: str
    unit: str
    value: Cell


def describe(trace: Trace) -> dict[str, list[Fact]]:
    """Facts by section. A trace that holds lengths only has the first three sections."""
    sections = {"Size": _size(trace), "Lengths": _lengths(trace), "Arrivals": _arrivals(trace)}
    if trace.num_blocks:
        profile = stack.profile(trace)
        if trace.recorded_hits:
            sections["Hits of the recorded cache"] = _recorded(trace)
        sections["Hits of an unlimited cache"] = _ceiling(profile)
        sections["Reuse of the trace blocks that hit"] = _reuse(profile)
        sections["Sharing"] = _sharing(profile)
    return sections


def facts_json(sections: dict[str, list[Fact]]) -> dict[str, Any]:
    """Any: JSON."""
    return {fact.name: fact.value for facts in sections.values() for fact in facts}


def facts_table(title: str, sections: dict[str, list[Fact]]) -> Table:
    rows: list[list[Cell]] = []
    for section, facts in sections.items():
        rows += [
            [section if index == 0 else "", fact.label, _show(fact.value), fact.unit]
            for index, fact in enumerate(facts)
        ]
    return Table(title, [Column(""), Column("figure"), Column("value"), Column("unit")], rows)


def _show(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if value >= 0.01 or value == 0 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(trace: Trace) -> list[Fact]:
    facts = [
        Fact("requests", "requests", "", trace.num_requests),
        Fact("input_tokens", "input tokens", "tokens", trace.num_tokens),
        Fact("output_tokens", "output tokens", "tokens", int(trace.output_tokens.sum())),
    ]
    if trace.num_blocks:
        facts += [
            Fact("block_tokens", "trace block", "tokens", trace.block_tokens),
            Fact("blocks", "trace blocks", "blocks", trace.num_blocks),
            Fact("unique_blocks", "unique trace blocks", "blocks", trace.num_unique),
            Fact("longest_request_blocks", "longest request", "blocks", trace.longest),
        ]
    if trace.block_bytes:
        facts.append(Fact("block_bytes", "KV of a trace block", "bytes", trace.block_bytes))
    return facts


def _lengths(trace: Trace) -> list[Fact]:
    return [
        *_spread("input", "input", "tokens per request", trace.input_tokens),
        *_spread("output", "output", "tokens per request", trace.output_tokens),
    ]


def _arrivals(trace: Trace) -> list[Fact]:
    duration = float(trace.timestamps_s[-1] - trace.timestamps_s[0])
    distinct = np.unique(trace.timestamps_s)
    facts = [
        Fact("duration_s", "duration", "s", duration),
        Fact("distinct_timestamps", "distinct timestamps", "", distinct.size),
    ]
    if duration > 0:
        gaps = np.diff(trace.timestamps_s)
        facts += [
            Fact("requests_per_s", "requests", "per s", (trace.num_requests - 1) / duration),
            Fact(
                "gap_variation",
                "gaps between requests: standard deviation / mean (Poisson: 1)",
                "",
                float(gaps.std() / gaps.mean()),
            ),
            Fact("step_s", "median step between distinct timestamps", "s", float(np.median(np.diff(distinct)))),
        ]
    return facts


def _recorded(trace: Trace) -> list[Fact]:
    percent = 100 / max(trace.num_tokens, 1)
    return [
        Fact(f"recorded_{tier}_hit_percent", f"{tier} hits", "% of all input tokens", percent * tokens)
        for tier, tokens in trace.recorded_hits.items()
    ]


def _ceiling(profile: stack.StackProfile) -> list[Fact]:
    trace = profile.trace
    curve, half = stack.hit_curve(profile), stack.hit_curve(profile, "last-half")
    blocks, tokens = curve.at(np.inf)
    hits = stack.request_hits(profile, np.inf)
    sizes = np.diff(trace.starts)
    share = np.minimum(hits * trace.block_tokens, trace.input_tokens) / np.maximum(trace.input_tokens, 1)
    facts = [
        Fact("hit_blocks", "hits", "blocks", blocks),
        Fact("hit_tokens", "hits", "tokens", tokens),
        Fact("block_hit_percent", "hits", "% of all blocks", 100 * blocks / curve.total_blocks),
        Fact("token_hit_percent", "hits", "% of all input tokens", 100 * tokens / curve.total_tokens),
    ]
    if half.total_tokens:
        warm = 100 * half.at(np.inf)[1] / half.total_tokens
        facts.append(
            Fact("last_half_token_hit_percent", "hits, last half of the requests", "% of their input tokens", warm)
        )
    counted = hits[sizes > 0] / sizes[sizes > 0]
    facts += [
        Fact(
            "mean_request_hit_percent",
            "mean over requests of their own hits",
            "% of a request's tokens",
            100 * float(share.mean()),
        ),
        Fact(
            "mean_request_block_percent", "the same by blocks", "% of a request's blocks", 100 * float(counted.mean())
        ),
        Fact("requests_with_hit_percent", "requests with a hit", "% of requests", 100 * float((hits > 0).mean())),
    ]
    return facts


def _reuse(profile: stack.StackProfile) -> list[Fact]:
    """Percentiles over the trace blocks that hit: how many others were touched since their last touch, and how long ago that was."""
    if profile.request.size == 0:
        return [Fact("reused_blocks", "reused trace blocks", "blocks", 0)]
    reached = stack.hit_curve(profile).hit_blocks  # cumulative hits by distance
    order = np.argsort(profile.age_s)
    by_age = np.cumsum(profile.length[order], dtype=np.int64)
    facts: list[Fact] = []
    for p in _PERCENTILES:
        distance = int(np.searchsorted(reached, p / 100 * reached[-1]))
        facts.append(
            Fact(
                f"reuse_distance_p{p}",
                f"distance (the smallest LRU capacity that hits), p{p}",
                "unique blocks",
                distance,
            )
        )
    for p in _PERCENTILES:
        age = float(profile.age_s[order[np.searchsorted(by_age, p / 100 * by_age[-1])]])
        facts.append(Fact(f"reuse_age_s_p{p}", f"time since the last touch, p{p}", "s", age))
    return facts


def _sharing(profile: stack.StackProfile) -> list[Fact]:
    trace = profile.trace
    sessions, named = sessions_of(profile)
    foreign = sessions[profile.request] != sessions[profile.previous]
    hits = int(profile.length.sum(dtype=np.int64))
    starts = trace.ids[trace.starts[:-1][np.diff(trace.starts) > 0]]
    common = np.bincount(starts)
    touched = np.bincount(trace.ids, minlength=trace.num_unique)
    between = int(profile.length[foreign].sum(dtype=np.int64))
    label = "sessions" if named else "sessions (inferred from prompts that contain an earlier prompt)"
    return [
        Fact("sessions", label, "", int(sessions.max()) + 1),
        Fact(
            "foreign_hit_percent",
            "hits on trace blocks that another session touched last",
            "% of hits",
            100 * between / max(hits, 1),
        ),
        Fact(
            "common_start_percent", "requests with the most common first trace block", "% of requests", _share(common)
        ),
        Fact("distinct_starts", "distinct first trace blocks", "blocks", int((common > 0).sum())),
        Fact(
            "used_once_percent",
            "trace blocks that were requested once",
            "% of unique blocks",
            100 * float((touched == 1).mean()),
        ),
    ]


def _share(counts: Int64) -> float:
    return 100 * int(counts.max()) / int(counts.sum())


def _spread(name: str, label: str, unit: str, values: Int64) -> list[Fact]:
    return [
        Fact(f"{name}_mean", f"{label}, mean", unit, float(values.mean())),
        *(_percentile(name, label, unit, values, p) for p in _PERCENTILES),
        Fact(f"{name}_max", f"{label}, longest", unit, int(values.max())),
    ]


def _percentile(name: str, label: str, unit: str, values: npt.NDArray[Any], p: int) -> Fact:
    # Any: integers or floats
    return Fact(f"{name}_p{p}", f"{label}, p{p}", unit, float(np.percentile(values, p)))
