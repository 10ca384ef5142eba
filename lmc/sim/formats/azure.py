"""Reads the Azure LLM inference trace: CSV of arrival, prompt length and output length. Without content it can have no hits."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.lines import Record, bad_line, read_lines
from lmc.sim.trace import Trace

_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


def matches(record: Record) -> bool:
    return list(record) == _COLUMNS


def read(path: Path, options: ReadOptions) -> Trace:
    builder = TraceBuilder(path.name, FORMAT.name, 1, sort=options.sort)
    lines = read_lines(path)
    next(lines)
    for number, line in lines:
        try:
            time, context, generated = line.decode().split(",")
            arrival = datetime.fromisoformat(time)
            builder.add(
                number, [], arrival.replace(tzinfo=arrival.tzinfo or UTC).timestamp(), int(context), int(generated)
            )
        except ValueError:
            raise bad_line(
                path, number, f"the line is not a row of {','.join(_COLUMNS)}", "repair or delete the line"
            ) from None
    builder.notes.append("the trace holds arrivals and lengths only, so hits cannot be simulated")
    return builder.finish(lengths_only=True)


FORMAT = Format("azure", "Azure LLM inference trace (CSV): arrivals and lengths only", matches, read)
