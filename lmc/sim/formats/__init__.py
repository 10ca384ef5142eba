"""The trace formats, one per module. The format of a file is found by its content."""

from __future__ import annotations

from pathlib import Path

from lmc.errors import TraceError
from lmc.sim.formats import (
    azure,
    bailian,
    burstgpt,
    kv_cache_tester,
    lmc_record,
    lmcache,
    mooncake,
    prompts,
    ragpulse,
    vllm_events,
)
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.lines import Record, files_of, read_lines, read_records
from lmc.sim.trace import Trace

# The order matters: the first format that matches is taken, so those with the most specific fields are first.
_MODULES = (lmc_record, lmcache, bailian, ragpulse, mooncake, kv_cache_tester, vllm_events, prompts, azure, burstgpt)
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
    number, record = _first_record(path)
    for candidate in FORMATS.values():
        if candidate.matches(record):
            return candidate
    raise TraceError(f"{path}, line {number}: {_no_format(record)}")


def _first_record(path: Path) -> tuple[int, Record]:
    """The first record with its line; of CSV the keys are the columns. Raises TraceError."""
    for number, line in read_lines(path):
        if line.startswith((b"{", b"[")):
            break
        return number, {column.strip(): None for column in line.decode(errors="replace").split(",")}
    for number, record in read_records(path):
        return number, record
    raise TraceError(f"{path}: the file is empty; give a trace with at least one request")


def _no_format(record: Record) -> str:
    """What is wrong with a first record of no known format: the fields that the most similar format has and the record has not."""
    shared = {
        known.name: len(record.keys() & set(known.fields)) / max(len(known.fields), 1) for known in FORMATS.values()
    }
    similar = max(FORMATS.values(), key=lambda known: shared[known.name])
    missing = [repr(name) for name in similar.fields if name not in record]
    if shared[similar.name] >= 0.5 and missing:
        one = len(missing) == 1
        return (
            f"the line looks like format {similar.name}, but {', '.join(missing)} {'is' if one else 'are'} missing; "
            f"add {'it' if one else 'them'} (docs/simulating.md shows the fields)"
        )
    return (
        f"the line has no known trace format; convert the file to one of {', '.join(FORMATS)} "
        "(docs/simulating.md shows their fields)"
    )
