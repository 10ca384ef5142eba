"""Reads lines and JSON records of a trace file, plain or compressed. Errors name their file and line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import zstandard

from lmc.errors import TraceError

Record = dict[str, Any]  # Any: a parsed JSON object; readers take fields with the functions below
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PIECE = 1 << 20


def files_of(path: Path) -> list[Path]:
    """The file itself, or the files of a folder by name, without hidden files and cache files. Raises TraceError if there are none."""
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    files = [file for file in files if file.suffix != ".lmcsim"]
    if not files:
        raise TraceError(f"{path}: the folder has no file; give a trace, or a folder of rotated logs")
    return files


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields numbered lines that are not blank. Compression is found by content. Raises TraceError."""
    number = 0
    try:
        with path.open("rb") as raw:
            for number, line in enumerate(_decompress(raw), start=1):
                stripped = line.strip()
                if stripped:
                    yield number, stripped
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise TraceError(
            f"{path}, after line {number}: the compressed file is damaged ({error}); get a complete copy"
        ) from None
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}; give a readable trace file") from None


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """Yields numbered JSON objects, one per line. Raises TraceError."""
    for number, line in read_lines(path):
        yield number, parse_record(path, number, line)


def parse_record(path: Path, number: int, line: bytes) -> Record:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise bad_line(path, number, f"the line is not JSON ({error})", "repair or delete the line") from None
    if not isinstance(record, dict):
        raise bad_line(
            path, number, f"the line is a JSON {type(record).__name__}, not an object", "repair or delete the line"
        )
    return record


def bad_line(path: Path, number: int, wrong: str, remedy: str) -> TraceError:
    return TraceError(f"{path}, line {number}: {wrong}; {remedy}")


def get_count(path: Path, number: int, record: Record, key: str) -> int:
    """A whole number from 0 on that is small enough for sums of its squares. Raises TraceError."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
        raise bad_line(path, number, f"{key!r} is {_show(record, key)}", "it must be a whole number from 0 to 2**40")
    return value


def get_number(path: Path, number: int, record: Record, key: str) -> float:
    """A number from 0 on, at most as large as microseconds since 1970; it may be text, as RAGPulse writes it. Raises TraceError."""
    value = record.get(key)
    try:
        parsed = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        parsed = -1.0
    if not 0 <= parsed < 2**53:
        raise bad_line(path, number, f"{key!r} is {_show(record, key)}", "it must be a number from 0 to 2**53")
    return parsed


def get_list(path: Path, number: int, record: Record, key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        raise bad_line(path, number, f"{key!r} is {_show(record, key)}", "it must be a list")
    return value


def get_text(path: Path, number: int, record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise bad_line(path, number, f"{key!r} is {_show(record, key)}", "it must be text")
    return value


def _show(record: Record, key: str) -> str:
    if key not in record:
        return "missing"
    text = repr(record[key])
    return text if len(text) <= 40 else text[:37] + "..."


def _decompress(raw: BinaryIO) -> Iterable[bytes]:
    """The lines of the file."""
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(_GZIP):
        return gzip.open(raw, "rb")
    return _split(_unzstd(raw)) if magic == _ZSTD else raw


def _unzstd(raw: BinaryIO) -> Iterator[bytes]:
    """Yields the content of all frames. Raises EOFError if the last frame is cut short, which zstandard's own reader does not notice."""
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    begun = False
    while piece := raw.read(_PIECE):
        while piece:
            begun = True
            yield frame.decompress(piece)
            piece = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = decompressor.decompressobj()
                begun = False
    if begun:
        raise EOFError("the last frame is cut short")


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    yield rest
