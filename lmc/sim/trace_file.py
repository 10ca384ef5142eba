"""A trace that has not been read yet: where it is and how to read it. And the traces of a folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmc.errors import ConfigError, TraceError
from lmc.sim.cache_file import load_trace, made_from
from lmc.sim.formats import find_format, lmcache, read_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.trace import Trace, speed_up


@dataclass(frozen=True)
class TraceFile:
    path: Path  # a file, or a folder of LMCache logs
    options: ReadOptions = field(default_factory=ReadOptions)
    format_name: str | None = None  # None: found from the content
    speed: float = 1.0
    cache: bool = True  # keep the parsed trace in a file

    def load(self) -> Trace:
        """Raises TraceError."""
        read = load_trace if self.cache else read_trace
        return speed_up(read(self.path, self.options, self.format_name), self.speed)

    def identity(self) -> dict[str, Any]:
        """What the trace depends on, the size and time of its files included. Raises TraceError. Any: JSON."""
        return {"path": str(self.path), "speed": self.speed, **made_from(self.path, self.options, self.format_name)}


def find_traces(files: Iterable[TraceFile]) -> tuple[list[TraceFile], list[str]]:
    """The traces, each folder replaced by all traces below it, and notes about files of folders that are no traces.

    A folder of LMCache logs is one trace, and the full files of lmc's record belong to the one that goes on. Raises ConfigError if
    something does not exist or there is no trace at all.
    """
    found: list[TraceFile] = []
    notes: list[str] = []
    for file in files:
        if not file.path.exists():
            raise ConfigError(f"{file.path}: there is no such file or folder; give traces, or folders of traces")
        if file.path.is_dir():
            _add_folder(file, found, notes)
        else:
            found.append(file)
    if not found:
        raise ConfigError("there is no trace in the folders; " + ("; ".join(notes) or "they hold no files"))
    return found, notes


def _add_folder(folder: TraceFile, found: list[TraceFile], notes: list[str]) -> None:
    parts = sorted(path for path in folder.path.iterdir() if not path.name.startswith("."))
    paths = [path for path in parts if path.is_file() and path.suffix != ".lmcsim" and not _is_rotated(path)]
    for number, path in enumerate(paths):
        try:
            known = find_format(path).name if folder.format_name is None else folder.format_name
        except TraceError as error:
            notes.append(f"left out: {error}")
            continue
        if number == 0 and known == lmcache.FORMAT.name:
            found.append(folder)
            break
        found.append(replace(folder, path=path))
    for path in parts:
        if path.is_dir():
            _add_folder(replace(folder, path=path), found, notes)


def _is_rotated(path: Path) -> bool:
    """Whether this is a full file of a record, PATH.1 and so on, and PATH is there."""
    return path.suffix[1:].isdigit() and path.with_suffix("").exists()
