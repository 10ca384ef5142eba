"""Keeps a parsed trace as one memory-mapped file, so that it is parsed only once.

The file is written beside the trace (TRACE.lmcsim) or, if that folder is read-only, in the user's cache folder. It is used only if the size
and time of every input, the options and the version of this module are still the same; otherwise the trace is parsed and written again.
The layout is: magic, 8 bytes of header length, JSON header, then the columns, each aligned to 64 bytes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from lmc.cache.shape import read_shape
from lmc.sim.formats import FORMATS, find_format, read_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.trace import Trace

_MAGIC = b"lmc-sim-trace-2\n"
_ALIGN = 64
_COLUMNS = (
    "ids",
    "starts",
    "timestamps_s",
    "input_tokens",
    "output_tokens",
    "parents",
    "tenants",
    "sessions",
    "classes",
)


def load_trace(path: Path, options: ReadOptions, format_name: str | None = None) -> Trace:
    """Like read_trace, but uses the cache file. It is no error if that cannot be written. Raises TraceError."""
    if not path.exists():
        return read_trace(path, options, format_name)
    wanted = made_from(path, options, format_name)
    for place in _places(path):
        trace = _read(place, wanted)
        if trace is not None:
            return trace
    trace = read_trace(path, options, format_name)
    for place in _places(path):
        if _write(place, wanted, trace):
            break
    return trace


def _places(path: Path) -> list[Path]:
    name = hashlib.blake2b(str(path.resolve()).encode(), digest_size=12).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [path.with_name(path.name + ".lmcsim"), home / "lmc" / "traces" / f"{name}.lmcsim"]


def made_from(path: Path, options: ReadOptions, format_name: str | None) -> dict[str, Any]:
    """What the parsed trace depends on, the size and time of every input included. Raises TraceError. Any: JSON."""
    known = format_name in FORMATS
    inputs = (FORMATS[format_name] if known and format_name else find_format(path)).inputs(path, options)
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in inputs if file.is_file()]
    return {"inputs": stats, "options": {**asdict(options), "tokenizer": str(options.tokenizer)}, "format": format_name}


def _write(place: Path, wanted: dict[str, Any], trace: Trace) -> bool:
    columns = {name: np.ascontiguousarray(getattr(trace, name)) for name in _COLUMNS}
    offset = 0
    places: dict[str, tuple[str, int, int]] = {}
    for name, column in columns.items():
        places[name] = (column.dtype.str, offset, column.size)
        offset += -(-column.nbytes // _ALIGN) * _ALIGN
    rest = {field.name: getattr(trace, field.name) for field in fields(trace) if field.name not in _COLUMNS}
    if trace.shape is not None:
        rest["shape"] = trace.shape.to_json()
    header = orjson.dumps({"made_from": wanted, "columns": places, "bytes": offset, "rest": rest})
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.stat().st_mode & 0o222:
            return False  # root could write here too, but the folder is marked read-only
        with temporary.open("wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            file.write(bytes(-file.tell() % _ALIGN))
            start = file.tell()
            for name, column in columns.items():
                file.write(bytes(start + places[name][1] - file.tell()))
                file.write(column.data)
            file.write(bytes(start + offset - file.tell()))
        temporary.replace(place)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def _read(place: Path, wanted: dict[str, Any]) -> Trace | None:
    try:
        with place.open("rb") as file:
            header = _read_header(file)
            if header is None or header["made_from"] != orjson.loads(orjson.dumps(wanted)):
                return None
            start = file.tell() + -file.tell() % _ALIGN
            if os.fstat(file.fileno()).st_size != start + header["bytes"]:
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        return None
    parts: dict[str, Any] = header["rest"]  # Any: fields of a Trace
    for name in ("tenant_names", "class_names", "notes"):
        parts[name] = tuple(parts[name])
    if parts["shape"] is not None:
        parts["shape"] = read_shape(parts["shape"], str(place))
    for name, (dtype, offset, count) in header["columns"].items():
        parts[name] = np.frombuffer(mapped, dtype=dtype, count=count, offset=start + offset)
    return Trace(**parts)


def _read_header(file: BinaryIO) -> dict[str, Any] | None:
    """The header of a cache file; None if the file is not one, or not whole. Any: JSON."""
    if file.read(len(_MAGIC)) != _MAGIC:
        return None
    size = int.from_bytes(file.read(8), "little")
    raw = file.read(size) if size < 1 << 26 else b""
    try:
        header: dict[str, Any] = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    return header
