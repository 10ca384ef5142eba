"""Draws the pictures of a study. Axes have units; captions name denominators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmc.report import COLORS, Figure, new_axes, to_figure
from lmc.sim.policies import BOUND
from lmc.sim.shown import WINDOWS as WINDOW_TEXT
from lmc.sim.stack import HitCurve
from lmc.sim.study import SHOWN, WINDOWS, Study
from lmc.sim.tier_grid import PERCENTILES
from lmc.sim.trace import Float64, Int64
from lmc.units import format_seconds, format_size

_RIVALS = COLORS[3:]
_TOKENS = "of the input tokens of the measured requests"


def miss_ratios(study: Study) -> Figure:
    """Draws the misses of LRU at every capacity, and of Belady and the policies at theirs, from a cold and from a warm cache."""
    picture, axes = new_axes(2, width=5.6)
    for axis, window in zip(axes, WINDOWS, strict=True):
        curve = study.curves[window]
        shown = _log_points(curve)
        axis.plot(
            _tokens(study, shown), _misses(curve, shown), color=COLORS[2], linewidth=2, label="lru, every capacity"
        )
        by_policy: dict[str, list[tuple[int, float]]] = {}
        for row in study.rows[window]:
            by_policy.setdefault(row.policy, []).append((int(row.capacity_blocks), 100 * (1 - row.token_hit_rate)))
        rivals = [policy for policy in by_policy if policy not in ("lru", BOUND)]
        for policy, points in by_policy.items():
            sizes, misses = zip(*points, strict=True)
            style: dict[str, Any]  # Any: matplotlib's keywords
            if policy == BOUND:
                style = {
                    "color": COLORS[1],
                    "linewidth": 1.6,
                    "marker": "o",
                    "markersize": 3,
                    "label": "belady, the bound",
                }
            elif policy in rivals:
                number = rivals.index(policy)
                style = {
                    "color": _RIVALS[number % len(_RIVALS)],
                    "linestyle": ("-", "--")[number // len(_RIVALS) % 2],
                    "linewidth": 1,
                    "label": policy,
                    "zorder": 1,
                }
            else:
                continue
            axis.plot(_tokens(study, sizes), misses, **style)
        floor = 100 * (1 - curve.at(np.inf)[1] / max(curve.total_tokens, 1))
        axis.axhline(floor, color="#555", linewidth=0.8, linestyle=":", label=f"unlimited cache: {floor:.1f} %")
        axis.set_title(WINDOW_TEXT[window], fontsize=9)
        axis.set_xscale("log")
        axis.set_ylim(0, 100)
        axis.set_xlabel(_capacity_label(study))
        axis.set_ylabel("input tokens that miss (%)")
        axis.legend(frameon=False, fontsize=7, loc="lower left", ncols=2)
    return to_figure(picture, "Miss ratio against capacity", f"Misses in % {_TOKENS}.")


def policy_map(study: Study) -> Figure:
    """Draws the hits of each policy minus those of LRU, in percentage points."""
    rows = study.rows[SHOWN]
    policies = sorted({row.policy for row in rows} - {"lru"}, key=lambda name: (name == BOUND, name))
    rate = {(row.policy, row.capacity_blocks): 100 * row.token_hit_rate for row in rows}
    gains = np.array([[rate[name, size] - rate["lru", size] for size in study.sizes] for name in policies])
    picture, (axis,) = new_axes(width=11.2, height=0.42 * len(policies) + 1.6)
    limit = max(float(np.abs(gains[:-1]).max()) if len(policies) > 1 else 0.0, 1.0)
    axis.imshow(gains, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    _cells(axis, gains, lambda value: f"{value:+.1f}")
    axis.set_yticks(range(len(policies)), policies)
    axis.set_xticks(range(len(study.sizes)), _sizes(study, study.sizes), rotation=45, ha="right", fontsize=8)
    axis.set_xlabel(_capacity_label(study))
    axis.grid(False)
    caption = f"Percentage points of hit tokens above or below LRU of the same size ({_TOKENS}); {WINDOW_TEXT[SHOWN]}."
    return to_figure(picture, "Policies against LRU", caption)


def chunk_sizes(study: Study) -> Figure:
    picture, (axis,) = new_axes()
    for chunk, curve in study.chunk_curves.items():
        shown = _log_points(curve)
        blocks = shown * (chunk // study.trace.block_tokens)
        axis.plot(_tokens(study, blocks), 100 - _misses(curve, shown), linewidth=1.5, label=f"{chunk:,} tokens")
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel(_capacity_label(study))
    axis.set_ylabel("input tokens that hit (%)")
    axis.legend(frameon=False, fontsize=8, title="chunk", title_fontsize=8)
    caption = f"LRU, full chunks only; the rest of a prompt that fills no chunk always misses. Hits in % {_TOKENS}; {WINDOW_TEXT[SHOWN]}."
    return to_figure(picture, "Hits by chunk size", caption)


def ttl_plane(study: Study) -> Figure:
    labels = ["none" if ttl_s == float("inf") else format_seconds(ttl_s) for ttl_s in study.ttls_s]
    picture, (axis,) = new_axes(width=11.2, height=0.36 * len(labels) + 1.5)
    _heat(axis, 100 * study.ttl_rates, labels, _sizes(study, study.sizes))
    axis.set_ylabel("time to live since the last touch")
    axis.set_xlabel(_capacity_label(study))
    return to_figure(picture, "Hits by time to live and capacity", f"LRU. Hits in % {_TOKENS}; {WINDOW_TEXT[SHOWN]}.")


def tier_map(study: Study) -> Figure:
    labels = _sizes(study, study.tier_sizes)
    picture, (axis,) = new_axes(height=4.2)
    _heat(axis, 100 * study.tier_rates, labels, labels)
    axis.set_ylabel(f"host {_capacity_label(study)}")
    axis.set_xlabel(f"disk {_capacity_label(study)}")
    caption = (
        "LRU with write: through, where the disk holds what the host holds too, so the larger of the two decides. Hits of both "
        f"together in % {_TOKENS}; {WINDOW_TEXT[SHOWN]}."
    )
    return to_figure(picture, "Hits of host and disk together", caption)


def times(study: Study) -> Figure:
    """Draws time to first token by host capacity; the study must have a cost model."""
    from matplotlib.ticker import NullFormatter

    picture, (axis,) = new_axes()
    sizes = [max(point.blocks["host"], study.sizes[0] / 2) for point in study.priced]
    for p, color in zip(PERCENTILES, (COLORS[2], COLORS[3], COLORS[1]), strict=True):
        values = [point.worth.ttft_s[p] for point in study.priced if point.worth]
        axis.plot(_tokens(study, sizes), values, marker="o", markersize=3, color=color, label=f"p{p}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    low, high = axis.get_ylim()
    axis.yaxis.set_minor_formatter("{x:g}" if high < 5 * low else NullFormatter())  # else the ticks overlap
    axis.set_xlabel(f"{_capacity_label(study)}; the leftmost point is no cache")
    axis.set_ylabel("time to first token (s)")
    axis.legend(frameon=False, fontsize=8)
    return to_figure(
        picture, "Time to first token against capacity", f"By the cost model, without queueing; {WINDOW_TEXT[SHOWN]}."
    )


def _heat(axis: Any, values: Float64, rows: Sequence[str], columns: Sequence[str]) -> None:  # Any: matplotlib
    axis.imshow(values, cmap="YlGnBu", vmin=0, vmax=max(float(values.max()) * 1.3, 1), aspect="auto")
    _cells(axis, values, lambda value: f"{value:.1f}")
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axis.grid(False)


def _cells(axis: Any, values: Float64, write: Callable[[float], str]) -> None:  # Any: matplotlib
    """Write numbers into the cells of the image that was just drawn, white on dark ones."""
    colors = axis.images[-1].to_rgba(values)[..., :3] @ np.array([0.3, 0.59, 0.11])
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            color = "white" if colors[row, column] < 0.5 else "black"
            text = write(float(values[row, column]))
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)


def _log_points(curve: HitCurve) -> Int64:
    largest = curve.hit_tokens.size - 1
    return np.unique(np.geomspace(1, largest, min(largest, 1000)).astype(np.int64))


def _misses(curve: HitCurve, blocks: Int64) -> Float64:
    return 100 * (1 - curve.hit_tokens[blocks] / max(curve.total_tokens, 1))


def _tokens(study: Study, blocks: Sequence[float] | Int64) -> Float64:
    """Capacities in trace blocks as tokens, or as GiB if the trace says how many bytes they have."""
    per_block = study.trace.block_bytes / 1024**3 if study.trace.block_bytes else study.trace.block_tokens
    return np.asarray(blocks, dtype=np.float64) * per_block


def _capacity_label(study: Study) -> str:
    return "capacity (GiB of KV cache)" if study.trace.block_bytes else "capacity (tokens of KV cache)"


def _sizes(study: Study, blocks: Sequence[int]) -> list[str]:
    if study.trace.block_bytes:
        return [format_size(size * study.trace.block_bytes) for size in blocks]
    tokens = [size * study.trace.block_tokens for size in blocks]
    return [f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} k" for count in tokens]
