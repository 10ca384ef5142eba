"""Reads BurstGPT: CSV of arrivals (seconds), models and lengths. Without content it can have no hits."""

from __future__ import annotations

import csv
from pathlib import Path

from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.fields import get_count, get_seconds
from lmc.sim.formats.lines import Record, bad_line, read_lines
from lmc.sim.trace import Trace

_TIME, _PROMPT, _ANSWER = "Timestamp", "Request tokens", "Response tokens"
_COLUMNS = (_TIME, _PROMPT, _ANSWER)


def matches(record: Record) -> bool:
    return set(_COLUMNS) <= record.keys()


def read(path: Path, options: ReadOptions) -> Trace:
    builder = TraceBuilder(path.name, FORMAT.name, 1, sort=options.sort)
    lines = read_lines(path)
    columns = _cells(next(lines)[1])
    for number, line in lines:
        cells = _cells(line)
        if len(cells) != len(columns):
            raise bad_line(
                path, number, f"{len(cells)} cells under {len(columns)} columns", "repair or delete the line"
            )
        row = dict(zip(columns, cells, strict=True))
        session = row.get("Session ID")
        builder.add(
            number,
            [],
            get_seconds(path, number, row, _TIME),
            get_count(path, number, row, _PROMPT),
            get_count(path, number, row, _ANSWER),
            tenant=row.get("Model", ""),
            session=session or None,
        )
    builder.notes.append("the trace holds arrivals and lengths only, so hits cannot be simulated")
    return builder.finish(lengths_only=True)


def _cells(line: bytes) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line.decode(errors="replace")]))]


FORMAT = Format("burstgpt", "BurstGPT (CSV): arrivals, models and lengths only", matches, read, fields=_COLUMNS)
