"""Draws the pictures of a bench report. A colour stands for one thing on the whole page: an arm, a tier, or a part of the time.

Arms differ in their lines and marks, too, for those who see or print no colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lmc.bench.records import Comparison, RequestRecord
from lmc.report import COLORS, Figure, new_axes, to_figure

ByArm = Mapping[str, Sequence[RequestRecord]]

_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
_TIERS = ("#c9e4e0", "#86c2ba", "#3f9088", "#1c5d57", "#0c3a36", "#dfe7c8")
_PARTS = ("#e5d3ea", "#c39bd0", "#92559f", "#4f2560")
_BESIDE = {
    "frameon": False,
    "fontsize": 9,
    "loc": "upper left",
    "bbox_to_anchor": (1.0, 1.0),
}  # of bars, never over one


def ttft_distribution(by_arm: ByArm) -> Figure:
    picture, (axis,) = new_axes()
    for index, (arm, records) in enumerate(by_arm.items()):
        values = np.sort([record.ttft_ms or np.nan for record in records])
        share = np.arange(1, values.size + 1) / max(values.size, 1) * 100
        axis.step(
            values, share, where="post", label=f"{arm} (n={values.size})", color=COLORS[index % len(COLORS)], lw=1.8,
            linestyle=_LINES[index % len(_LINES)],
        )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(_plain)
    axis.set_xlabel("time to first token (ms)")
    axis.set_ylabel("requests at or below (%)")
    axis.set_ylim(0, 102)
    axis.legend(frameon=False, fontsize=9)
    return to_figure(
        picture, "TTFT distribution per arm", "Cumulative share of answered requests; further left is faster."
    )


def ttft_against_hits(by_arm: ByArm) -> Figure:
    picture, (axis,) = new_axes()
    markers = "osD^vP*X"
    for index, (arm, records) in enumerate(by_arm.items()):
        known = [record for record in records if record.cached_tokens is not None]
        axis.scatter(
            [(record.cached_tokens or 0) / record.prompt_tokens * 100 for record in known],
            [record.ttft_ms for record in known],
            label=arm,
            s=26,
            alpha=0.8,
            marker=markers[index % len(markers)],
            color=COLORS[index % len(COLORS)],
            edgecolors="none",
        )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_plain)
    axis.set_xlim(-2, 102)
    axis.set_xlabel("prompt tokens from a cache (%)")
    axis.set_ylabel("time to first token (ms)")
    axis.legend(frameon=False, fontsize=9)
    return to_figure(picture, "TTFT against cached tokens", "One mark per request.")


def hit_rate_over_time(by_arm: ByArm) -> Figure:
    picture, (axis,) = new_axes()
    for index, (arm, records) in enumerate(by_arm.items()):
        known = sorted((r for r in records if r.cached_tokens is not None), key=lambda record: record.sent_s)
        if not known:
            continue
        hits = np.cumsum([record.cached_tokens or 0 for record in known])
        prompts = np.cumsum([record.prompt_tokens for record in known])
        times = [record.sent_s for record in known]
        style = {"color": COLORS[index % len(COLORS)], "linestyle": _LINES[index % len(_LINES)]}
        axis.plot(times, hits / prompts * 100, label=arm, lw=1.8, marker=".", **style)
    axis.set_ylim(-2, 102)
    axis.set_xlabel("time since the start of the load (s)")
    axis.set_ylabel("hit tokens / prompt tokens so far (%)")
    if axis.get_lines():
        axis.legend(frameon=False, fontsize=9)
    return to_figure(picture, "Hit rate over time", "Cumulative, in the order of sending; all tiers together.")


def hits_per_tier(tiers_by_arm: Mapping[str, Mapping[str, int]], tiers: Sequence[str]) -> Figure:
    picture, (axis,) = new_axes(height=1.2 + 0.45 * len(tiers_by_arm))
    arms = list(tiers_by_arm)
    left = np.zeros(len(arms))
    for index, tier in enumerate(tiers):
        tokens = np.array([tiers_by_arm[arm].get(tier, 0) for arm in arms], dtype=np.float64)
        axis.barh(arms, tokens, left=left, label=tier, color=_TIERS[index % len(_TIERS)], height=0.6)
        left += tokens
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(_plain)
    axis.set_xlabel("hit tokens over the measured load")
    if tiers:
        axis.legend(**_BESIDE)
    return to_figure(picture, "Hits per tier", "Counted by the engine (device) and by lmc (other tiers).")


def ttft_parts(groups: Sequence[tuple[str, Sequence[RequestRecord]]], parts: Sequence[str]) -> Figure:
    picture, (axis,) = new_axes(height=1.2 + 0.45 * len(groups))
    names = [f"{name} (n={len(records)})" for name, records in groups]
    left = np.zeros(len(groups))
    for index, part in enumerate(parts):
        known = [[getattr(record.parts, f"ttft_{part}_ms") or 0.0 for record in records] for _, records in groups]
        means = np.array([np.mean(values) for values in known])
        axis.barh(names, means, left=left, label=part, color=_PARTS[index % len(_PARTS)], height=0.6)
        left += means
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(_plain)
    axis.set_xlabel("time to first token, mean (ms)")
    axis.legend(**_BESIDE)
    return to_figure(picture, "TTFT in parts", "Means over the requests with hits and over those without.")


def trend(series: Sequence[Sequence[Comparison]]) -> Figure:
    """The median TTFT of every arm in every run, as a ratio to the first run, with its interval."""
    picture, (axis,) = new_axes()
    arms = dict.fromkeys(c.a.split(" in ")[0] for found in series for c in found)
    for index, arm in enumerate(arms):
        points = [
            (number, c)
            for number, found in enumerate(series, start=1)
            for c in found
            if c.metric == "ttft_p50" and c.over == "all" and c.a.split(" in ")[0] == arm
        ]
        ratios = np.array([c.ratio for _, c in points])
        spread = np.abs(np.array([[c.low for _, c in points], [c.high for _, c in points]]) - ratios)
        color = COLORS[index % len(COLORS)]
        axis.errorbar(
            [number for number, _ in points], ratios, spread, label=arm, color=color, marker="o", ms=4, capsize=3
        )
    axis.axhline(1.0, color="#555555", lw=1, ls=":")
    axis.set_xticks(range(1, len(series) + 1))
    axis.set_xlabel("run, in the given order")
    axis.set_ylabel("median TTFT / that of the first run")
    axis.legend(frameon=False, fontsize=9)
    return to_figure(picture, "Trend", "Bars are 95 % intervals; below 1 is faster than the first run.")


RatePoints = Sequence[tuple[float, float, float | None, float | None, float | None]]


def latency_over_throughput(lines: Mapping[str, RatePoints], slo: Mapping[str, float | None]) -> Figure:
    """Of each arm: (requests/s, output tokens/s, TTFT p50, TTFT p90, TPOT p50; times in ms) at each rate."""
    picture, (left, right) = new_axes(2, width=5.2)
    markers = "osD^vP*X"
    for index, (arm, points) in enumerate(lines.items()):
        style = {"color": COLORS[index % len(COLORS)], "marker": markers[index % len(markers)], "ms": 4}
        rates, tokens = [point[0] for point in points], [point[1] for point in points]
        left.plot(rates, [np.nan if p[2] is None else p[2] for p in points], label=f"{arm}, p50", **style)
        left.plot(rates, [np.nan if p[3] is None else p[3] for p in points], label=f"{arm}, p90", ls="--", **style)
        right.plot(tokens, [np.nan if p[4] is None else p[4] for p in points], label=arm, **style)
    for axis, name, label in (
        (left, "ttft_ms", "time to first token (ms)"),
        (right, "tpot_ms", "time per output token, p50 (ms)"),
    ):
        if bound := slo.get(name):
            axis.axhline(bound, color="#555555", lw=1, ls=":", label="SLO")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=8)
    left.set_xlabel("requests/s")
    right.set_xlabel("output tokens/s")
    return to_figure(
        picture, "Latency over throughput", "One mark per rate; further right at the same height serves more."
    )


def _plain(value: float, _: int) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
