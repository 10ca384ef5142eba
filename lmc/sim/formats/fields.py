"""Takes fields from the records of a trace file: counts, numbers, times, texts and hashes. Errors name file, line, field and remedy."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lmc.sim.formats.lines import Record, bad_line

_NANOSECONDS, _MICROSECONDS, _MILLISECONDS = 1e17, 1e14, 1e11  # an epoch time above these cannot be in a larger unit
_2_64 = 1 << 64


def get_count(path: Path, number: int, record: Record, key: str, default: int | None = None) -> int:
    """A whole number from 0 on that is small enough for sums of its squares. 12.0 and "12" are 12; null is absent. Raises TraceError."""
    value = record.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, float | str) and (parsed := _number(value)).is_integer():
        value = int(parsed)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
        raise bad_line(path, number, f"{key!r} is {_show(record, key)}", "it must be a whole number from 0 to 2**40")
    return value


def get_number(path: Path, number: int, record: Record, key: str) -> float:
    """A number from 0 to 2**53; it may be text, as RAGPulse writes it. Raises TraceError."""
    parsed = _number(record.get(key))
    if not 0 <= parsed < 2**53:
        raise bad_line(path, number, f"{key!r} is {_show(record, key)}", "it must be a number from 0 to 2**53")
    return parsed


def get_seconds(path: Path, number: int, record: Record, key: str, unit_s: float = 1.0) -> float:
    """A time in seconds. It is a number of units, as a number or text, an epoch time in a unit that its size tells, or an ISO date.

    Raises TraceError.
    """
    value = record.get(key)
    parsed = _number(value)
    if math.isnan(parsed) and isinstance(value, str):
        try:
            date = datetime.fromisoformat(value.strip())
            return date.replace(tzinfo=date.tzinfo or UTC).timestamp()
        except (ValueError, OverflowError):
            pass
    if not 0 <= parsed < 2**63:
        raise bad_line(
            path,
            number,
            f"{key!r} is {_show(record, key)}",
            "it must be a number from 0 on, or a date such as 2026-01-31T12:00:00Z",
        )
    if parsed > _NANOSECONDS:
        return parsed / 1e9
    if parsed > _MICROSECONDS:
        return parsed / 1e6
    return parsed / 1e3 if parsed > _MILLISECONDS else parsed * unit_s


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


def class_of(path: Path, number: int, record: Record) -> str:
    """The request's class, which a file may tell in the field `class`; empty if it does not."""
    return "" if record.get("class") is None else get_text(path, number, record, "class")


class Hashes:
    """Takes lists of hashes from a file: 64-bit integers with or without a sign, or texts such as hex digits, but not both in one file."""

    def __init__(self) -> None:
        self.taken = False  # whether there was any list, even an empty one
        self._texts: bool | None = None
        self._numbers: dict[str, int] = {}

    def take(self, path: Path, number: int, record: Record, key: str) -> Sequence[int]:
        """Integers that are equal exactly if the hashes are. Raises TraceError."""
        values = get_list(path, number, record, key)
        self.taken = True
        if not values:
            return []
        if self._texts is None:
            self._texts = isinstance(values[0], str)
        if self._texts:
            if all(isinstance(value, str) for value in values):
                known = self._numbers
                return [known.setdefault(value, len(known)) for value in values]
            raise bad_line(
                path, number, f"{key!r} has an element that is not text, as others are", "write all in one form"
            )
        try:
            return array("q", values)
        except (TypeError, OverflowError):
            pass
        if not all(
            isinstance(value, int) and not isinstance(value, bool) and -_2_64 // 2 <= value < _2_64 for value in values
        ):
            raise bad_line(
                path,
                number,
                f"{key!r} has an element that is not a 64-bit integer",
                "write 64-bit integers, or all hashes of the file as text",
            )
        return [value if value < _2_64 // 2 else value - _2_64 for value in values]


class Timestamps:
    """Takes the `timestamp` of each line of a file, which all lines have or none has."""

    def __init__(self, unit_s: float = 1.0, otherwise: str = "give one in every line, or in none") -> None:
        """unit_s: seconds of a number. otherwise: the remedy when only some lines have one."""
        self._unit_s = unit_s
        self._otherwise = otherwise
        self._there: bool | None = None  # not known before the first line

    def take(self, path: Path, number: int, record: Record) -> float:
        """Seconds; 0 in a file without timestamps. Raises TraceError."""
        there = record.get("timestamp") is not None
        if self._there not in (None, there):
            wrong = f"'timestamp' is {'there' if there else 'missing'}, unlike in the lines before"
            raise bad_line(path, number, wrong, self._otherwise)
        self._there = there
        return get_seconds(path, number, record, "timestamp", self._unit_s) if there else 0.0

    @property
    def notes(self) -> list[str]:
        if self._there is not False:
            return []
        return ["the file has no timestamps, so all requests arrive at second 0, in the order of the file"]


def _number(value: Any) -> float:  # Any: a parsed JSON value
    """A number, or one that is written as text; else not a number."""
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _show(record: Record, key: str) -> str:
    if key not in record:
        return "missing"
    text = repr(record[key])
    return text if len(text) <= 40 else text[:37] + "..."
