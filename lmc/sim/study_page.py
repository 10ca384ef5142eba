"""Writes the report of a study: one HTML page, its pictures, and its rows as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmc
from lmc import report
from lmc.report import Cell, Column, Report, Section, Table
from lmc.sim import study_pictures
from lmc.sim.describe import describe, facts_table
from lmc.sim.policies import BOUND
from lmc.sim.shown import WINDOWS, trace_json
from lmc.sim.size_show import size_table
from lmc.sim.study import SHOWN, TARGETS, Study
from lmc.sim.sweep_show import row_json
from lmc.sim.tier_grid import PERCENTILES
from lmc.sim.tune import ASSUMED_TOKEN_BYTES, assumed_note
from lmc.units import format_count, format_percent, format_size

_SHARES = (0.01, 0.03, 0.10, 0.30, 1.0)


def write_report(study: Study, folder: Path, command: str, origin: str = "") -> Path:
    """Write report.html, its pictures and rows.csv. Returns the path of the page."""
    page = _page(study, command, origin)
    report.write_pictures(folder, page)
    report.write_file(folder / "rows.csv", report.table_csv(_rows(study)))
    report.write_file(folder / "report.html", report.report_html(page))
    return folder / "report.html"


def report_json(study: Study, page: Path) -> dict[str, Any]:
    """Any: JSON."""
    rows = {window: [row_json(row) for row in rows] for window, rows in study.rows.items()}
    return {"trace": trace_json(study.trace), "report": str(page), "rows": rows, "notes": list(study.trace.notes)}


def _page(study: Study, command: str, origin: str) -> Report:
    trace = study.trace
    sections = [
        *_sizes_sections(study),
        Section(
            "How much memory for how many hits",
            _memory_text(study),
            [_shares_table(study), study_pictures.miss_ratios(study)],
        ),
        Section("Which policy", _policy_text(study), [study_pictures.policy_map(study)]),
        Section("Which chunk size", "", [study_pictures.chunk_sizes(study)]),
        Section("How long to keep chunks", "", [study_pictures.ttl_plane(study)]),
        Section(
            "How to split host and disk",
            "",
            [study_pictures.tier_map(study), *([_modes_table(study)] if study.modes else [])],
        ),
    ]
    if study.priced:
        sections.append(
            Section("What it does to time to first token", "", [study_pictures.times(study), _times_table(study)])
        )
    sections.append(Section("The trace", "\n\n".join(trace.notes), [facts_table(trace.source, describe(trace))]))
    metadata = {"trace": f"{trace.source} ({trace.format})", "command": command, "lmc": lmc.__version__}
    if origin:
        metadata["origin and licence of the trace"] = origin
    return Report(f"Cache study of {trace.source}", _summary(study), sections, metadata)


def _summary(study: Study) -> str:
    trace, curve = study.trace, study.curves["all"]
    ceiling = curve.at(float("inf"))[1] / curve.total_tokens
    warm = study.curves["last-half"]
    warm_ceiling = warm.at(float("inf"))[1] / max(warm.total_tokens, 1)
    return (
        f"{trace.num_requests:,} requests with {format_count(trace.num_tokens)} input tokens in {trace.num_unique:,} unique "
        f"trace blocks of {trace.block_tokens:,} tokens. An unlimited cache would hit {format_percent(ceiling)} of the input tokens, "
        f"{format_percent(warm_ceiling)} in the last half of the requests."
    )


def _sizes_sections(study: Study) -> list[Section]:
    """What an operator asks first: the sizes of tiers for shares of the hits that an unlimited cache has."""
    trace = study.trace
    if not study.sizings:
        return []
    shares = ", ".join(f"{share:.0%}" for share in TARGETS)
    text = f"Ways to reach {shares} of the hits of an unlimited cache: host memory alone, or less of it above a disk or a remote tier."
    if not trace.block_bytes:
        text += f" Note: {assumed_note()}."
    block_bytes = trace.block_bytes or ASSUMED_TOKEN_BYTES * trace.block_tokens
    return [Section("What to buy", text, [size_table(study.sizings, block_bytes, trace.source)])]


def _memory_text(study: Study) -> str:
    curve = study.curves[SHOWN]
    most = curve.at(float("inf"))[1]
    parts = []
    for share in (0.5, 0.8, 0.9, 0.99):
        blocks = int((curve.hit_tokens >= share * most).argmax())
        size = format_size(blocks * study.trace.block_bytes) if study.trace.block_bytes else f"{blocks:,} trace blocks"
        parts.append(f"{share:.0%} with {size} ({format_count(blocks * study.trace.block_tokens)} tokens)")
    return (
        f"LRU reaches these shares of the hits of an unlimited cache: {', '.join(parts)}. All tables and pictures that do not say "
        f"otherwise are of the {WINDOWS[SHOWN]}."
    )


def _policy_text(study: Study) -> str:
    wins: dict[str, int] = {}
    for size in study.sizes:
        wins[study.best(SHOWN, size).policy] = wins.get(study.best(SHOWN, size).policy, 0) + 1
    ranked = sorted(wins.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{policy} at {count}" for policy, count in ranked)
    return f"Number of capacities ({len(study.sizes)} in all) at which a policy has the most hits, Belady's bound excluded: {shown}."


def _shares_table(study: Study) -> Table:
    """Hits at the capacities of the study that are nearest to _SHARES of the unique trace blocks."""
    rows: list[list[Cell]] = []
    trace = study.trace
    nearest = [min(study.sizes, key=lambda blocks: abs(blocks - share * trace.num_unique)) for share in _SHARES]
    for size in dict.fromkeys(nearest):
        found = {row.policy: row for row in study.rows[SHOWN] if row.capacity_blocks == size}
        best = study.best(SHOWN, size)
        rows.append(
            [
                size,
                100 * size / trace.num_unique,
                _size(study, size),
                100 * found["lru"].token_hit_rate,
                best.policy,
                100 * best.token_hit_rate,
                100 * found[BOUND].token_hit_rate,
            ]
        )
    columns = [
        Column("capacity", "blocks"),
        Column("capacity", "% of unique blocks"),
        Column("capacity", "GiB") if trace.block_bytes else Column("capacity", "tokens"),
        Column("lru", "% of tokens"),
        Column("best policy"),
        Column("its hits", "% of tokens"),
        Column("belady", "% of tokens"),
    ]
    total = study.curves[SHOWN].total_tokens
    note = f"100 % is {total:,} input tokens; {WINDOWS[SHOWN]}."
    return Table("Hits by capacity", columns, rows, note)


def _modes_table(study: Study) -> Table:
    rows: list[list[Cell]] = [
        [
            mode.write,
            _size(study, mode.host_blocks),
            _size(study, mode.disk_blocks),
            100 * mode.host_rate,
            100 * mode.disk_rate,
            100 * (mode.host_rate + mode.disk_rate),
        ]
        for mode in study.modes
    ]
    unit = "GiB" if study.trace.block_bytes else "tokens"
    columns = [
        Column("write"),
        Column("host", unit),
        Column("disk", unit),
        Column("host hits", "% of tokens"),
        Column("disk hits", "% of tokens"),
        Column("hits", "% of tokens"),
    ]
    note = f"LRU, replayed with the live cache's own directory; full chunks of one trace block; {WINDOWS[SHOWN]}."
    return Table("Hits by write mode", columns, rows, note)


def _size(study: Study, blocks: int) -> float:
    """GiB if the trace says how many bytes a trace block has, else tokens."""
    trace = study.trace
    return blocks * trace.block_bytes / 1024**3 if trace.block_bytes else blocks * trace.block_tokens


def _times_table(study: Study) -> Table:
    rows: list[list[Cell]] = [
        [
            int(point.blocks["host"]),
            100 * point.hit_rate,
            *point.worth.ttft_s.values(),
            point.worth.saved_prefill_s / 3600,
            point.worth.dollars_per_million,
        ]
        for point in study.priced
        if point.worth
    ]
    columns = [
        Column("host", "blocks"),
        Column("hits", "% of tokens"),
        *(Column(f"TTFT p{p}", "s", 3) for p in PERCENTILES),
        Column("saved prefill", "GPU h"),
        Column("cost", "$/M tokens", 4),
    ]
    return Table("Times and money by the cost model", columns, rows, f"{WINDOWS[SHOWN]}; LRU; without queueing.")


def _rows(study: Study) -> Table:
    records = [{"window": window, **row_json(row)} for window, rows in study.rows.items() for row in rows]
    return Table("rows", [Column(name) for name in records[0]], [list(record.values()) for record in records])
