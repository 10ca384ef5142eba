"""Writes the result of tuning as a table, as JSON, and as a settings file for `lmc serve --config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lmc.cache.settings import load_settings
from lmc.report import Cell, Column, Table, write_file
from lmc.sim.bootstrap import Interval
from lmc.sim.shown import trace_json
from lmc.sim.tune import Tuned
from lmc.sim.tune_search import Point, settings_of
from lmc.units import format_percent, format_seconds, format_size


def write_settings(tuned: Tuned, path: Path, disk_path: Path) -> None:
    """Write the settings file, with the trace and the expected hits as comments, and read it back to check it."""
    expected = tuned.expected
    head = [
        f"# Written by lmc sim tune from {tuned.trace.source} ({tuned.trace.num_requests:,} requests).",
        f"# Expected: {format_percent(expected.value)} of the input tokens hit "
        f"(95 % interval {format_percent(expected.low)} to {format_percent(expected.high)});",
        f"# an unlimited cache would hit {format_percent(tuned.ceiling)}. Measured on the second half of the trace.",
    ]
    body = yaml.safe_dump(settings_of(tuned.chosen, disk_path, tuned.compress), sort_keys=False)
    write_file(path, "\n".join([*head, body]))
    load_settings(path)


def tune_json(tuned: Tuned, disk_path: Path) -> dict[str, Any]:
    """Any: JSON."""
    return {
        "trace": trace_json(tuned.trace),
        "token_bytes": tuned.token_bytes,
        "config": settings_of(tuned.chosen, disk_path, tuned.compress),
        "expected_hit_rate": tuned.expected.value,
        "interval": [tuned.expected.low, tuned.expected.high],
        "hit_rate_over_lru": tuned.over_lru.value,
        "interval_over_lru": [tuned.over_lru.low, tuned.over_lru.high],
        "unlimited_hit_rate": tuned.ceiling,
        "denominator": "input tokens of the last half of the requests",
        "front": [point_json(point) for point in tuned.front],
        "tried": [point_json(point) for point in tuned.tried],
        "notes": list(tuned.notes),
    }


def front_table(tuned: Tuned) -> Table:
    rows: list[list[Cell]] = [
        [
            "chosen" if _same_sizes(point, tuned.chosen) else "",
            point.chunk_tokens,
            point.policy,
            format_size(point.host_bytes),
            format_size(point.disk_bytes) if point.disk_bytes else "none",
            100 * point.tuning_hit_rate,
            100 * point.hit_rate,
            *([] if point.ttft_s is None else [point.ttft_s[90]]),
            *([] if point.dollars_per_million is None else [point.dollars_per_million]),
        ]
        for point in tuned.front
    ]
    columns = [
        Column(""),
        Column("chunk", "tokens"),
        Column("policy"),
        Column("host"),
        Column("disk"),
        Column("second quarter", "% of tokens"),
        Column("second half", "% of tokens"),
        *([] if tuned.chosen.ttft_s is None else [Column("TTFT p90", "s", 3)]),
        *([] if tuned.chosen.dollars_per_million is None else [Column("cost", "$/M tokens", 4)]),
    ]
    write = f"{tuned.chosen.write}" + (
        f" ({tuned.chosen.write_touches} touches)" if tuned.chosen.write == "around" else ""
    )
    ttl = "none" if tuned.chosen.ttl_s is None else format_seconds(tuned.chosen.ttl_s)
    note = (
        f"Hit tokens / all input tokens. The second quarter of the requests chose, the second half judges. Chosen: "
        f"{_show(tuned.expected)} expected, {_show(tuned.over_lru, signed=True)} against LRU in the same sizes, "
        f"{format_percent(tuned.ceiling)} unlimited; write {write}; TTL {ttl}. {len(tuned.tried)} configurations tried."
    )
    return Table(f"Points that no other beats, {tuned.trace.source}", columns, rows, note)


def _show(interval: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{interval.value * 100:{sign}.2f} % ({interval.low * 100:{sign}.2f} to {interval.high * 100:{sign}.2f})"


def _same_sizes(point: Point, chosen: Point) -> bool:
    names = ("chunk_tokens", "policy", "host_bytes", "disk_bytes")
    return all(getattr(point, name) == getattr(chosen, name) for name in names)


def point_json(point: Point) -> dict[str, Any]:  # Any: JSON
    """The configuration and its rates."""
    return {
        "chunk_tokens": point.chunk_tokens,
        "policy": point.policy,
        "host_bytes": point.host_bytes,
        "disk_bytes": point.disk_bytes,
        "ttl_s": point.ttl_s,
        "write": point.write,
        "write_touches": point.write_touches,
        "min_load_tokens": point.min_load_tokens,
        "tuning_hit_rate": point.tuning_hit_rate,
        "tuning_host_hit_rate": point.tuning_host_rate,
        "hit_rate": point.hit_rate,
        "tuning_dollars_per_million_tokens": point.tuning_dollars,
        "dollars_per_million_tokens": point.dollars_per_million,
        "ttft_s": None if point.ttft_s is None else {f"p{p}": value for p, value in point.ttft_s.items()},
    }
