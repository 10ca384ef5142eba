"""The trace formats, one per module. The format of a file is found by its content."""

from __future__ import annotations

from pathlib import Path

from lmc.errors import TraceError
from lmc.sim.formats import (
    azure,
    bailian,
    kv_cache_tester,
    lmc_record,
    lmcache,
    mooncake,
    prompts,
    ragpulse,
    vllm_events,
)
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.lines import files_of, parse_record, read_lines
from lmc.sim.trace import Trace

# The order matters: the first format that matches is taken, so those with the most specific fields are first.
_MODULES = (lmc_record, lmcache, bailian, ragpulse, mooncake, kv_cache_tester, vllm_events, prompts, azure)
FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in _MODULES}


def read_trace(path: Path, options: ReadOptions | None = None, format_name: str | None = None) -> Trace:
    """Read a trace of any known format. Raises TraceError with file, line and remedy."""
    options = options or ReadOptions()
    if format_name is not None:
        if format_name not in FORMATS:
            raise TraceError(f"unknown trace format {format_name!r}; there are {', '.join(FORMATS)}")
        return FORMATS[format_name].read(path, options)
    return find_format(path).read(path, options)


def find_format(path: Path) -> Format:
    """The format of a file, found by its first record; that of a folder, by its first file. Raises TraceError."""
    path = files_of(path)[0]
    for number, line in read_lines(path):
        is_csv = not line.startswith((b"{", b"["))
        record = dict.fromkeys(line.decode(errors="replace").split(",")) if is_csv else parse_record(path, number, line)
        for candidate in FORMATS.values():
            if candidate.matches(record):
                return candidate
        raise TraceError(
            f"{path}, line {number}: the line has no known trace format; convert the file to one of {', '.join(FORMATS)} "
            "(docs/simulating.md shows their fields)"
        )
    raise TraceError(f"{path}: the file is empty; give a trace with at least one request")
