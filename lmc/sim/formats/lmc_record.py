"""Reads lmc's own record (lmc serve --record): a header line, then one line per lookup with the names of its full chunks.

The files that were renamed because they were full are read with it, as long as their chunks are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lmc.cache.observe.record import NAME_BYTES, SAME_CHUNKS, TRACE_FORMAT, TRACE_VERSION, rotated
from lmc.cache.shape import read_shape
from lmc.errors import TraceError
from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.fields import class_of, get_count, get_list, get_number, get_text
from lmc.sim.formats.lines import Record, bad_line, read_records
from lmc.sim.trace import Int64, Trace


def matches(record: Record) -> bool:
    return record.get("format") == TRACE_FORMAT


def read(path: Path, options: ReadOptions) -> Trace:
    first, header, _ = _begin(path)
    chunk_tokens = get_count(path, first, header, "chunk_tokens")
    if chunk_tokens == 0:
        raise bad_line(path, first, "'chunk_tokens' is 0", "it must be positive")
    if options.block_tokens not in (None, chunk_tokens):
        raise TraceError(f"{path}: the record says that its chunks have {chunk_tokens} tokens; remove --block-tokens")
    files = inputs(path, options)
    # Runs of several files go by the time of day, which may have been set back between them.
    builder = TraceBuilder(
        path.name, FORMAT.name, chunk_tokens, sort=options.sort or len(files) > 1, rechain=options.rechain
    )
    hits: dict[str, int] = {}
    started: float | None = None
    for file in files:
        line, own, records = _begin(file)
        if any(own.get(name) != header.get(name) for name in SAME_CHUNKS):
            builder.notes.append(f"{file.name} holds other chunks and was left out")
            continue
        began = get_number(file, line, own, "started") if "started" in own else 0.0
        started = began if started is None else started
        builder.begin_file(file.name)
        for number, record in records:
            for tier, tokens in _hits(file, number, record).items():
                hits[tier] = hits.get(tier, 0) + tokens
            builder.add(
                number,
                _hashes(file, number, record),
                began - started + get_number(file, number, record, "t"),
                get_count(file, number, record, "tokens"),
                0,
                tenant=str(record.get("tenant", "")),
                session=None if record.get("session") is None else get_text(file, number, record, "session"),
                request_class=class_of(file, number, record),
            )
    trace = builder.finish()
    shape = read_shape(header["shape"], f"{path}, line {first}") if "shape" in header else None
    return replace(trace, block_bytes=get_count(path, first, header, "chunk_bytes"), recorded_hits=hits, shape=shape)


def inputs(path: Path, options: ReadOptions) -> list[Path]:
    return [*rotated(path), path]


def _begin(path: Path) -> tuple[int, Record, Iterator[tuple[int, Record]]]:
    """The header with its line, and the records that follow it."""
    records = read_records(path)
    first, header = next(records)
    if not matches(header):
        raise bad_line(
            path, first, f"the line is not a {TRACE_FORMAT} header", "give a file written by lmc serve --record"
        )
    if header.get("version") != TRACE_VERSION:
        raise bad_line(
            path,
            first,
            f"the record has version {header.get('version')!r}",
            f"this lmc reads version {TRACE_VERSION}; upgrade lmc",
        )
    return first, header, records


def _hits(path: Path, number: int, record: Record) -> dict[str, int]:
    hits = record.get("hit_tokens", {})
    if not isinstance(hits, dict) or not all(isinstance(tokens, int) for tokens in hits.values()):
        raise bad_line(path, number, "'hit_tokens' is not a mapping of tiers to tokens", "repair or delete the line")
    return hits


def _hashes(path: Path, number: int, record: Record) -> Int64:
    names = get_list(path, number, record, "chunks")
    try:
        packed = bytes.fromhex("".join(names))
    except (TypeError, ValueError):
        packed = b""
    if len(packed) != NAME_BYTES * len(names):
        raise bad_line(
            path,
            number,
            f"'chunks' is not a list of names of {2 * NAME_BYTES} hex digits",
            "repair or delete the line",
        )
    return np.frombuffer(packed, dtype=">u8").astype(np.uint64).view(np.int64)


FORMAT = Format("lmc", "lmc's own record of lookups", matches, read, inputs)
