"""Reads LMCache's lookup-hash log: JSONL with one lookup per line. A folder of rotated logs is one trace, sorted by time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from lmc.errors import TraceError
from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.fields import get_count, get_list, get_seconds
from lmc.sim.formats.lines import Record, bad_line, files_of, read_records
from lmc.sim.trace import Trace

_ITEM_BYTES = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}


def matches(record: Record) -> bool:
    return {"chunk_hashes", "seq_len", "chunk_size"} <= record.keys()


def read(path: Path, options: ReadOptions) -> Trace:
    builder: TraceBuilder | None = None
    chunk_bytes = 0
    models: set[str] = set()
    files = files_of(path)
    for file in files:
        if builder is not None:
            builder.begin_file(file.name)
        for number, record in read_records(file):
            size = get_count(file, number, record, "chunk_size")
            if builder is None:
                if size == 0:
                    raise bad_line(file, number, "'chunk_size' is 0", "it must be positive")
                builder = TraceBuilder(
                    path.name, FORMAT.name, size, sort=options.sort or len(files) > 1, rechain=options.rechain
                )
                builder.begin_file(file.name)
                chunk_bytes = _chunk_bytes(record)
            if size != builder.block_tokens:
                raise bad_line(
                    file,
                    number,
                    f"chunk_size {size} after {builder.block_tokens}",
                    "split the log by chunk size",
                )
            names = get_list(file, number, record, "chunk_hashes")
            if not all(isinstance(name, str) for name in names):
                raise bad_line(file, number, "'chunk_hashes' is not a list of texts", "repair the line")
            model = str(record.get("model_name", ""))
            models.add(model)
            builder.add(
                number,
                builder.name_to_int(f"{model}/{name}" for name in names),
                get_seconds(file, number, record, "timestamp"),
                get_count(file, number, record, "seq_len"),
                0,
                tenant=model,
            )
    if builder is None:
        raise TraceError(f"{path}: the file is empty; give a trace with at least one request")
    if len(models) > 1:
        chunk_bytes = 0
        builder.notes.append(f"{len(models)} models share the capacity; their chunks may differ in bytes")
    return replace(builder.finish(), block_bytes=chunk_bytes)


def _chunk_bytes(record: Record) -> int:
    """Bytes of a chunk, from shapes and dtypes; 0 if these do not say it."""
    shapes, dtypes = record.get("shapes"), record.get("dtypes")
    if not isinstance(shapes, list) or not isinstance(dtypes, list) or len(shapes) != len(dtypes):
        return 0
    if not all(
        isinstance(shape, list) and all(isinstance(side, int) and side > 0 for side in shape) for shape in shapes
    ):
        return 0
    if not all(isinstance(dtype, str) and dtype in _ITEM_BYTES for dtype in dtypes):
        return 0
    return sum(math.prod(shape) * _ITEM_BYTES[dtype] for shape, dtype in zip(shapes, dtypes, strict=True))


def inputs(path: Path, options: ReadOptions) -> list[Path]:
    return files_of(path)


FORMAT = Format(
    "lmcache",
    "LMCache's lookup-hash log (--lookup-hash-log-dir); the model is the group",
    matches,
    read,
    inputs,
    fields=("timestamp", "chunk_hashes", "seq_len", "chunk_size"),
)
