"""What a sweep over many traces says about its policies: the mean of their hit rates, and how they compare with LRU trace by trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmc.report import Column, Table
from lmc.sim.shown import WINDOWS, Shown, show_capacity
from lmc.sim.sweep_jobs import Row
from lmc.sim.sweep_results import COLUMNS


def summary(rows: Sequence[Row], path: Path, notes: tuple[str, ...]) -> Shown:
    """One line for each chunk size, capacity and policy, over all traces."""
    sizes: dict[str, set[int]] = {}
    for row in rows:
        sizes.setdefault(row["trace"], set()).add(row["chunk_tokens"])
    several = any(len(found) > 1 for found in sizes.values())
    lines = [_line(found, several) for found in _groups(rows, several).values()]
    against = any(line["worst_against_lru"] is not None for line in lines)
    columns = [
        Column("policy"),
        *([Column("chunk", "tokens")] if several else []),
        Column("capacity"),
        Column("traces", decimals=0),
        Column("hits, mean", "% of tokens"),
        *([Column("against lru, mean", "points"), Column("worst", "points"), Column("worst on")] if against else []),
    ]
    cells = [
        [
            line["policy"],
            *([line["chunk_tokens"]] if several else []),
            line["capacity"],
            line["traces"],
            100 * line["mean_token_hit_rate"],
            *(
                [_points(line["mean_against_lru"]), _points(line["worst_against_lru"]), line["worst_on"]]
                if against
                else []
            ),
        ]
        for line in lines
    ]
    measured = f"Measured: {WINDOWS[rows[0]['window']]}. " if rows else ""
    table = Table(
        f"Prefix hits over {len({row['trace'] for row in rows})} traces",
        columns,
        cells,
        note=f"{measured}The mean counts every trace alike. All {len(rows)} results are in {path}.",
    )
    shown = [_row_json(row) for row in rows]
    return Shown(table, {"results": str(path), "summary": lines, "rows": shown, "notes": list(notes)})


def rows_table(rows: Sequence[Row]) -> Table:
    names = [name for name in COLUMNS.names if name != "job"]
    return Table("rows", [Column(name) for name in names], [[_row_json(row)[name] for name in names] for row in rows])


def _groups(rows: Sequence[Row], several: bool) -> dict[tuple[int, str, str], list[tuple[Row, Row | None]]]:
    """Rows with the row of LRU at the same place, by capacity and policy, and by chunk size if there are several for one trace."""
    lru = {_place(row): row for row in rows if row["policy"] == "lru"}
    groups: dict[tuple[int, str, str], list[tuple[Row, Row | None]]] = {}
    for row in rows:
        groups.setdefault((row["chunk_tokens"] if several else 0, row["capacity"], row["policy"]), []).append(
            (row, lru.get(_place(row)))
        )
    return groups


def _place(row: Row) -> tuple[str, int, str]:
    return row["trace"], row["chunk_tokens"], row["capacity"]


def _line(found: list[tuple[Row, Row | None]], several: bool) -> dict[str, Any]:  # Any: JSON
    row = found[0][0]
    gains = [(one["token_hit_rate"] - lru["token_hit_rate"], one["trace"]) for one, lru in found if lru is not None]
    if row["policy"] == "lru":
        gains = []
    worst = min(gains, default=None)
    return {
        "policy": row["policy"],
        "chunk_tokens": row["chunk_tokens"] if several else None,
        "capacity": row["capacity"],
        "traces": len(found),
        "mean_token_hit_rate": sum(one["token_hit_rate"] for one, _ in found) / len(found),
        "mean_against_lru": sum(gain for gain, _ in gains) / len(gains) if gains else None,
        "worst_against_lru": worst[0] if worst else None,
        "worst_on": Path(worst[1]).name if worst else None,
    }


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _row_json(row: Row) -> dict[str, Any]:  # Any: JSON, which has no infinity
    sizes = {name: show_capacity(row[name]) for name in ("capacity_blocks", "capacity_tokens")}
    return {name: value for name, value in {**row, **sizes}.items() if name != "job"}
