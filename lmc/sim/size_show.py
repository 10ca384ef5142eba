"""Shows the sizes of tiers for a hit rate as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lmc.errors import ConfigError
from lmc.report import Cell, Column, Table
from lmc.sim.cost import CostModel, known_token_bytes
from lmc.sim.sessions import INFERRED
from lmc.sim.shown import WINDOWS, Shown, show_capacity, trace_json
from lmc.sim.size import BELOW, WINDOW, Sizer, Sizing
from lmc.sim.tier_grid import PERCENTILES
from lmc.sim.trace import Trace
from lmc.sim.tune import ASSUMED_TOKEN_BYTES, assumed_note
from lmc.units import parse_size


def size_targets(
    trace: Trace, targets: Sequence[str], cost: CostModel | None, token_bytes: int, memory: str | None
) -> Shown:
    """Sizes for these targets, such as 60%. Raises ConfigError for one that no capacity reaches."""
    known = known_token_bytes(trace, token_bytes, cost)
    block_bytes = (known or ASSUMED_TOKEN_BYTES) * trace.block_tokens
    sizer = Sizer(trace)
    host = None if memory is None else parse_size(memory) // block_bytes
    if host == 0:
        raise ConfigError(f"--memory {memory} holds no trace block of {block_bytes} bytes; give more")
    sizings = [sizer.size(parse_share(target), cost, host) for target in targets]
    notes = list(trace.notes)
    if not known:
        notes.append(assumed_note())
    if not sizer.sessions_named:
        notes.append(INFERRED)
    json = {
        "trace": trace_json(trace),
        "window": WINDOW,
        "token_bytes": block_bytes // trace.block_tokens,
        "unlimited_hit_rate": sizer.ceiling,
        "rows": [record for sizing in sizings for record in _records(sizing, block_bytes)],
        "notes": notes,
    }
    return Shown(size_table(sizings, block_bytes, trace.source), json)


def parse_share(text: str) -> float:
    """0.6 from "60%" or "0.6". Raises ConfigError."""
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ConfigError(f"{text!r} is no share of the tokens; write 60% or 0.6")
    return value


def size_table(sizings: Sequence[Sizing], block_bytes: int, source: str) -> Table:
    """One row for each way to place the capacity of a target."""
    priced = bool(sizings) and any(place.worth for place in sizings[0].places)
    rows: list[list[Cell]] = []
    for sizing in sizings:
        for place in sizing.places:
            cells: list[Cell] = [100 * sizing.target]
            cells += [_gib(place.blocks.get(name, 0), block_bytes) for name in ("host", *BELOW)]
            cells += [f"{_round(sizing.low_blocks, block_bytes)} to {_round(sizing.high_blocks, block_bytes)}"]
            cells.append(100 * sizing.rate)
            if priced and place.worth:
                cells += [*place.worth.ttft_s.values(), place.worth.dollars_per_million]
            rows.append(cells)
    columns = [
        Column("target", "% of tokens"),
        *(Column(name, "GiB", 1) for name in ("host", *BELOW)),
        Column("largest tier, interval", "GiB"),
        Column("hits", "% of tokens"),
        *([*(Column(f"TTFT p{p}", "s", 3) for p in PERCENTILES), Column("cost", "$/M tokens", 4)] if priced else []),
    ]
    note = f"LRU with write: through, {WINDOWS[WINDOW]}. The interval holds 95 % of the resamples of sessions."
    return Table(f"Sizes for a hit rate, {source}", columns, rows, note)


def _records(sizing: Sizing, block_bytes: int) -> list[dict[str, Any]]:  # Any: JSON
    records = []
    for place in sizing.places:
        record: dict[str, Any] = {  # Any: JSON
            "target": sizing.target,
            "hit_rate": sizing.rate,
            **{f"{name}_bytes": int(size) * block_bytes for name, size in place.blocks.items()},
            "capacity_blocks": sizing.blocks,
            "interval_blocks": [sizing.low_blocks, show_capacity(sizing.high_blocks)],
        }
        if place.worth:
            record |= {f"ttft_p{p}_s": value for p, value in place.worth.ttft_s.items()}
            record["dollars_per_million_tokens"] = place.worth.dollars_per_million
        records.append(record)
    return records


def _gib(blocks: float, block_bytes: int) -> float | None:
    return blocks * block_bytes / 1024**3 if blocks else None


def _round(blocks: float, block_bytes: int) -> str:
    return f"{blocks * block_bytes / 1024**3:,.1f}" if math.isfinite(blocks) else "more than the trace tells"
