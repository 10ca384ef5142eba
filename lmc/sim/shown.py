"""What all results of lmc sim share: a table with its JSON, the names of the windows, and how a trace and a capacity are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lmc.errors import ConfigError
from lmc.report import Table
from lmc.sim.trace import Trace, Window

WINDOWS: dict[Window, str] = {
    "all": "all requests, from an empty cache",
    "last-half": "last half of the requests, cache warmed by the first",
}


@dataclass(frozen=True)
class Shown:
    table: Table
    json: dict[str, Any]  # Any: JSON

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that belong under the table."""
        return tuple(self.json["notes"])


def parse_window(text: str) -> Window:
    """The window of that name. Raises ConfigError."""
    if text not in WINDOWS:
        raise ConfigError(f"unknown window {text!r}; there are {', '.join(WINDOWS)}")
    return text


def trace_json(trace: Trace) -> dict[str, Any]:
    """The description of the trace in every result. Any: JSON."""
    return {
        "source": trace.source,
        "format": trace.format,
        "requests": trace.num_requests,
        "blocks": trace.num_blocks,
        "unique_blocks": trace.num_unique,
        "block_tokens": trace.block_tokens,
        "input_tokens": trace.num_tokens,
        "longest_request_blocks": trace.longest,
    }


def show_capacity(blocks: float) -> int | str:
    return int(blocks) if math.isfinite(blocks) else "inf"
