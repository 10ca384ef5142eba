"""Reads lines and JSON records of a trace file, plain or compressed. Errors name their file and line."""

from __future__ import annotations

import bisect
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import zstandard

from lmc.errors import TraceError

Record = dict[str, Any]  # Any: a parsed JSON object; readers take fields with the functions below
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BOM = b"\xef\xbb\xbf"
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
    """Yields numbered lines that are not blank, without line ends and byte order mark. Finds compression by content. Raises TraceError."""
    number = 0
    try:
        with path.open("rb") as raw:
            for number, line in enumerate(_decompress(raw), start=1):
                stripped = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
                if stripped:
                    yield number, stripped
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise TraceError(
            f"{path}, after line {number}: the compressed file is damaged ({error}); get a complete copy"
        ) from None
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}; give a readable trace file") from None


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """Yields JSON objects with the line on which each begins: one per line, or those of a JSON document. Raises TraceError."""
    lines = read_lines(path)
    for number, line in itertools.islice(lines, 1):
        if _is_whole(line):
            yield number, parse_record(path, number, line)
        else:
            yield from _read_document(path, [(number, line), *lines])
    for number, line in lines:
        yield number, parse_record(path, number, line)


def _is_whole(line: bytes) -> bool:
    """Whether a line of a file is a JSON object by itself, as in JSONL, and not the beginning of a JSON document."""
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _read_document(path: Path, lines: list[tuple[int, bytes]]) -> Iterator[tuple[int, Record]]:
    """Yields the objects of one JSON array, or several objects one after the other, over any number of lines."""
    starts = list(itertools.accumulate((len(line.decode(errors="replace")) + 1 for _, line in lines), initial=0))
    text = "\n".join(line.decode(errors="replace") for _, line in lines)

    def line_of(place: int) -> int:
        return lines[min(bisect.bisect_right(starts, place), len(lines)) - 1][0]

    def skip(place: int) -> int:
        while place < len(text) and text[place].isspace():
            place += 1
        return place

    decoder = json.JSONDecoder()
    is_array = text.startswith("[")
    place = skip(1 if is_array else 0)
    while place < len(text) and not (is_array and text[place] == "]"):
        try:
            record, end = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else place
            raise bad_line(path, line_of(at), f"the text is not JSON ({error})", "repair the file") from None
        if not isinstance(record, dict):
            raise bad_line(
                path, line_of(place), f"a JSON {type(record).__name__} is not an object", "repair or delete it"
            )
        yield line_of(place), record
        place = skip(end)
        if is_array and text[place : place + 1] == ",":
            place = skip(place + 1)
        elif is_array and text[place : place + 1] != "]":
            raise bad_line(path, line_of(place), "the JSON array does not go on with , or ]", "repair the file")


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
