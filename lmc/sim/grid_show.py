"""Tables and JSON of hits by TTL and capacity, by tier sizes, and by tenant. Every rate names its denominator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmc.report import Cell, Column, Table
from lmc.sim import projections
from lmc.sim.capacity import parse_tier, several, warn_small
from lmc.sim.cost import CostModel
from lmc.sim.groups import group_hits
from lmc.sim.shown import WINDOWS, Shown, show_capacity, trace_json
from lmc.sim.stack import hit_curve, profile
from lmc.sim.tier_grid import PERCENTILES, TierPoint, tier_grid
from lmc.sim.trace import Trace, Window, require_blocks
from lmc.units import format_seconds, parse_seconds


def ttl_plane(trace: Trace, ttls: Sequence[str], capacities: Sequence[float], window: Window) -> Shown:
    require_blocks(trace)
    seconds = [float("inf") if text == "inf" else parse_seconds(text) for text in ttls]
    stack = profile(trace)
    total = max(hit_curve(stack, window).total_tokens, 1)
    plane = projections.ttl_plane(stack, seconds, capacities, window)
    records = [
        {
            "ttl_s": "inf" if ttl_s == float("inf") else ttl_s,
            "capacity_blocks": show_capacity(capacity),
            "hit_blocks": blocks,
            "hit_tokens": tokens,
            "total_tokens": total,
        }
        for ttl_s, row in zip(seconds, plane, strict=True)
        for capacity, (blocks, tokens) in zip(capacities, row, strict=True)
    ]
    columns = [Column("TTL"), *(Column(f"{_with_commas(show_capacity(size))} blocks", "%") for size in capacities)]
    rows: list[list[Cell]] = [
        [
            "none" if ttl_s == float("inf") else format_seconds(ttl_s),
            *(100 * tokens / total for _, tokens in row),
        ]
        for ttl_s, row in zip(seconds, plane, strict=True)
    ]
    note = f"Hit tokens in % of {total:,} input tokens; {WINDOWS[window]}. LRU; a touch renews the time to live."
    return Shown(
        Table(f"Hits by time to live and capacity, {trace.source}", columns, rows, note),
        _json(trace, window, records, capacities),
    )


def tiers(
    trace: Trace,
    sizes: Mapping[str, Sequence[str]],
    window: Window,
    cost: CostModel | None,
    exclusive: bool,
    token_bytes: int,
) -> Shown:
    require_blocks(trace)
    known_bytes = token_bytes or (cost.token_bytes if cost else 0)
    blocks = {name: several(texts, lambda text: parse_tier(text, trace, known_bytes)) for name, texts in sizes.items()}
    points = tier_grid(profile(trace), blocks, window, cost, exclusive)
    records = [_point_json(point) for point in points]
    names = list(sizes)
    columns = [
        *(Column(name, "blocks") for name in names),
        *(Column(f"{name} hits", "% of tokens") for name in names),
        Column("hits", "% of tokens"),
        *(
            [
                *(Column(f"TTFT p{p}", "s", 3) for p in PERCENTILES),
                Column("saved prefill", "GPU h"),
                Column("cost", "$/M tokens", 4),
            ]
            if cost
            else []
        ),
    ]
    rows = [_point_cells(point) for point in points]
    how = "a trace block is in one tier only" if exclusive else "every tier sees every touch"
    parts = [f"100 % is {points[0].total_tokens:,} input tokens; {WINDOWS[window]}. LRU; {how}."]
    breaks: dict[str, int | None] = {}
    if cost:
        breaks = {name: cost.break_even_tokens(name) for name in names}
        shown = [f"{name} {'never' if tokens is None else f'{tokens:,} tokens'}" for name, tokens in breaks.items()]
        parts.append(f"Loading is faster than recomputing from: {', '.join(shown)}. The times contain no queueing.")
    json = {
        **_json(trace, window, records, filter(None, blocks["host"])),
        "exclusive": exclusive,
        "break_even_tokens": breaks,
    }
    return Shown(Table(f"Hits by tier, {trace.source}", columns, rows, " ".join(parts)), json)


def groups(trace: Trace, capacities: Sequence[float], window: Window) -> Shown:
    require_blocks(trace)
    records: list[dict[str, Any]] = []  # Any: JSON
    rows: list[list[Cell]] = []
    for capacity in capacities:
        for found in group_hits(trace, capacity, window):
            shown = show_capacity(capacity)
            records.append(
                {
                    "capacity_blocks": shown,
                    "group": found.group,
                    "requests": found.requests,
                    "total_tokens": found.total_tokens,
                    "shared_hit_tokens": found.shared_hit_tokens,
                    "quota_blocks": found.quota_blocks,
                    "quota_hit_tokens": found.quota_hit_tokens,
                }
            )
            percent = 100 / max(found.total_tokens, 1)
            rows.append(
                [
                    shown,
                    found.group or "(none)",
                    found.requests,
                    found.total_tokens,
                    percent * found.shared_hit_tokens,
                    found.quota_blocks,
                    percent * found.quota_hit_tokens,
                ]
            )
    columns = [
        Column("capacity", "blocks"),
        Column("group"),
        Column("requests"),
        Column("input", "tokens"),
        Column("hits, shared cache", "% of its tokens"),
        Column("best quota", "blocks"),
        Column("hits in its quota", "% of its tokens"),
    ]
    note = f"{WINDOWS[window]}. LRU. The quotas split the capacity so that hit tokens are most; groups with quotas share nothing."
    return Shown(
        Table(f"Hits by group, {trace.source}", columns, rows, note), _json(trace, window, records, capacities)
    )


def _point_json(point: TierPoint) -> dict[str, Any]:  # Any: JSON
    record: dict[str, Any] = {f"{name}_blocks": show_capacity(size) for name, size in point.blocks.items()}
    record |= {f"{name}_hit_tokens": tokens for name, tokens in point.hit_tokens.items()}
    record |= {"hit_tokens": sum(point.hit_tokens.values()), "total_tokens": point.total_tokens}
    if point.worth:
        record |= {f"ttft_p{p}_s": value for p, value in point.worth.ttft_s.items()}
        record["saved_prefill_s"] = point.worth.saved_prefill_s
        record["dollars_per_million_tokens"] = point.worth.dollars_per_million
    return record


def _point_cells(point: TierPoint) -> list[Cell]:
    cells: list[Cell] = [show_capacity(size) for size in point.blocks.values()]
    cells += [100 * tokens / max(point.total_tokens, 1) for tokens in point.hit_tokens.values()]
    cells.append(100 * point.hit_rate)
    if point.worth:
        cells += [*point.worth.ttft_s.values(), point.worth.saved_prefill_s / 3600, point.worth.dollars_per_million]
    return cells


def _json(
    trace: Trace,
    window: Window,
    records: list[dict[str, Any]],  # Any: JSON
    capacities: Iterable[float],
) -> dict[str, Any]:
    notes = [*trace.notes, *warn_small(trace, capacities)]
    return {"trace": trace_json(trace), "window": window, "rows": records, "notes": notes}


def _with_commas(size: int | str) -> str:
    return size if isinstance(size, str) else f"{size:,}"
