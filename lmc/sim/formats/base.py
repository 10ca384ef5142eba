"""The interface of a trace format: a name, a test of the first record, and a reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmc.sim.formats.lines import Record
from lmc.sim.trace import Trace


@dataclass(frozen=True)
class ReadOptions:
    block_tokens: int | None = (
        None  # of a trace block, for formats that do not say it or are cut into trace blocks here
    )
    sort: bool = False  # sort requests by time instead of refusing them out of order
    rechain: bool = False  # hashes name single trace blocks, not prefixes
    session_gap_s: float = 60.0  # seconds between session starts, for traces whose sessions have separate clocks
    tokenizer: Path | None = None  # for prompts as text


def _itself(path: Path, options: ReadOptions) -> list[Path]:
    return [path]


@dataclass(frozen=True)
class Format:
    name: str
    summary: str
    matches: Callable[
        [Record], bool
    ]  # whether this is the first record of such a file; of CSV the keys are the columns
    read: Callable[[Path, ReadOptions], Trace]
    inputs: Callable[[Path, ReadOptions], list[Path]] = _itself  # all files that the result depends on
    fields: tuple[str, ...] = ()  # of a record, for saying which one is missing
