"""What a trace format is: a name, a test on the first record, a reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmc.sim.formats.lines import Record
from lmc.sim.trace import Trace


@dataclass(frozen=True)
class ReadOptions:
    block_tokens: int | None = None  # for formats that do not say it, or that are cut into blocks here
    sort: bool = False  # sort requests by time instead of refusing disorder
    rechain: bool = False  # hashes name single blocks, not prefixes
    session_gap_s: float = 60.0  # for sessions without a common clock: seconds between their starts
    tokenizer: Path | None = None  # for prompts as text


def _itself(path: Path, options: ReadOptions) -> list[Path]:
    return [path]


@dataclass(frozen=True)
class Format:
    name: str
    summary: str
    matches: Callable[[Record], bool]  # is this the first record of such a file? For CSV: its columns are the keys
    read: Callable[[Path, ReadOptions], Trace]
    inputs: Callable[[Path, ReadOptions], list[Path]] = _itself  # every file that the result depends on
