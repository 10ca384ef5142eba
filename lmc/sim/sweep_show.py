"""A sweep as table, picture, CSV rows and JSON. Every rate names its denominator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lmc.report import Column, Figure, Table, new_axes, to_figure
from lmc.sim.shown import WINDOWS, show_capacity, trace_json
from lmc.sim.sweep import Row, Sweep


def row_json(row: Row) -> dict[str, Any]:
    """A row; an unlimited capacity is written "inf", because JSON has no infinity. Any: JSON."""
    capacity = show_capacity(row.capacity_blocks)
    return {
        "policy": row.policy,
        "capacity_blocks": capacity,
        "hit_blocks": row.hit_blocks,
        "total_blocks": row.total_blocks,
        "hit_tokens": row.hit_tokens,
        "total_tokens": row.total_tokens,
        "chunk_tokens": row.chunk_tokens,
        "capacity_tokens": capacity if isinstance(capacity, str) else capacity * row.chunk_tokens,
        "block_hit_rate": row.block_hit_rate,
        "token_hit_rate": row.token_hit_rate,
        **({} if row.error is None else {"token_hit_rate_error": row.error}),
        **({} if row.hit_bytes is None else {"hit_bytes": row.hit_bytes}),
        **({} if row.saved_prefill_s is None else {"saved_prefill_s": row.saved_prefill_s}),
    }


def sweep_json(sweep: Sweep) -> dict[str, Any]:
    """Any: JSON."""
    return {
        "trace": trace_json(sweep.trace),
        "window": sweep.window,
        "rows": [row_json(row) for row in sweep.rows],
        "notes": list(sweep.notes),
    }


def sweep_table(sweep: Sweep) -> Table:
    several = len(sweep.totals) > 1  # the chunk size then replaces the share of trace blocks, for a narrow screen
    sampled = any(row.error is not None for row in sweep.rows)
    priced = any(row.saved_prefill_s is not None for row in sweep.rows)
    columns = [
        Column("policy"),
        *([Column("chunk", "tokens")] if several else []),
        Column("capacity", "blocks"),
        Column("hits", "blocks"),
        *([] if several else [Column("hits", "% of blocks")]),
        Column("hits", "tokens"),
        Column("hits", "% of tokens"),
        *([Column("error", "points")] if sampled else []),
        *([Column("saved prefill", "GPU h")] if priced else []),
    ]
    rows = [
        [
            row.policy,
            *([row.chunk_tokens] if several else []),
            show_capacity(row.capacity_blocks),
            row.hit_blocks,
            *([] if several else [100 * row.block_hit_rate]),
            row.hit_tokens,
            100 * row.token_hit_rate,
            *([] if row.error is None else [100 * row.error]),
            *([] if row.saved_prefill_s is None else [row.saved_prefill_s / 3600]),
        ]
        for row in sweep.rows
    ]
    totals = ", ".join(f"{blocks:,} trace blocks of {chunk:,} tokens" for chunk, blocks in sweep.totals.items())
    total_tokens = sweep.rows[0].total_tokens
    return Table(
        f"Prefix hits, {sweep.trace.source}",
        columns,
        rows,
        note=f"Measured: {WINDOWS[sweep.window]}. 100 % is {totals}, and {total_tokens:,} input tokens.",
    )


def sweep_rows(sweep: Sweep) -> Table:
    """The rows for CSV, under the names that --json uses."""
    records = [row_json(row) for row in sweep.rows]
    return Table("rows", [Column(name) for name in records[0]], [list(record.values()) for record in records])


def miss_ratio_figure(sweep: Sweep) -> Figure:
    """Draws LRU at every capacity, one line per chunk size, and the other policies at their capacities."""
    picture, (axis,) = new_axes()
    several = len(sweep.curves) > 1
    for chunk_tokens, curve in sweep.curves.items():
        largest = curve.hit_tokens.size - 1
        shown = np.unique(np.geomspace(1, largest, min(largest, 1000)).astype(np.int64))
        misses = 100 * (1 - curve.hit_tokens[shown] / max(curve.total_tokens, 1))
        axis.plot(
            shown * chunk_tokens, misses, linewidth=1.6, label=f"lru, chunks of {chunk_tokens}" if several else "lru"
        )
        others: dict[str, list[Row]] = {}
        for row in sweep.rows:
            if row.policy != "lru" and row.chunk_tokens == chunk_tokens and math.isfinite(row.capacity_blocks):
                others.setdefault(row.policy, []).append(row)
        for policy, rows in others.items():
            axis.plot(
                [row.capacity_blocks * chunk_tokens for row in rows],
                [100 * (1 - row.token_hit_rate) for row in rows],
                marker="o",
                markersize=4,
                linewidth=0.8,
                label=f"{policy}, chunks of {chunk_tokens}" if several else policy,
            )
    axis.set_xscale("log")
    axis.set_ylim(0, 100)
    axis.set_xlabel("capacity (tokens of KV cache)")
    axis.set_ylabel("input tokens that miss (%)")
    axis.legend(frameon=False, fontsize=8)
    caption = f"{sweep.trace.source}; {WINDOWS[sweep.window]}. Denominator: all input tokens of the measured requests."
    return to_figure(picture, "Miss ratio against capacity", caption)
