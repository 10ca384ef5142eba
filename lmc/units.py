"""Parse and format sizes, counts and durations. Nothing else in lmc does.

Sizes take decimal and binary units ("8 GB" is 8e9 bytes, "8GiB" is 8 * 2**30), durations take ns, us, ms, s, m, h, d.
"""

from __future__ import annotations

import math
import re

from lmc.errors import ConfigError

_NUMBER = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*$")
_SIZES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _SIZES[f"{_letter}b"] = 1000**_power
    _SIZES[f"{_letter}ib"] = 1024**_power
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SECONDS = {"": 1.0, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str | int) -> int:
    """Bytes from "8GiB", "8 GB", "512" or a whole number. Raises ConfigError."""
    value = _parse(text, _SIZES, "a size", "8GiB, 512 MB or a number of bytes")
    if value != int(value):
        raise ConfigError(f"{text!r} is not a whole number of bytes")
    return int(value)


def parse_count(text: str | int) -> int:
    """A count from "1000", "5k", "3M" or "1Mi". Raises ConfigError."""
    value = _parse(text, _COUNTS, "a count", "1000, 5k or 3M")
    if value != int(value):
        raise ConfigError(f"{text!r} is not a whole number")
    return int(value)


def parse_seconds(text: str | float) -> float:
    """Seconds from "10ms", "1.5 s", "2h" or a number. Raises ConfigError."""
    return float(_parse(text, _SECONDS, "a duration", "10ms, 1.5s, 2h or a number of seconds"))


def _parse(text: str | float, factors: dict[str, int] | dict[str, float], what: str, examples: str) -> float:
    if isinstance(text, bool):
        raise ConfigError(f"{text!r} is not {what}; write {examples}")
    if isinstance(text, int | float):
        if not math.isfinite(text) or text < 0:
            raise ConfigError(f"{text!r} is not {what}: it must be finite and not negative")
        return text
    match = _NUMBER.match(text)
    factor = factors.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"{text!r} is not {what}; write {examples}")
    number = int(match[1]) if match[1].isdigit() else float(match[1])
    return number * factor


def format_size(num_bytes: float) -> str:
    """ "1.5 GiB"; whole bytes below 1 KiB."""
    return _scale(num_bytes, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"])


def format_count(count: float) -> str:
    """ "12,031" below a million, then "144.8 M"."""
    if abs(count) < 1_000_000:
        return f"{count:,.0f}"
    return _scale(count, 1000, ["", "k", "M", "G", "T"])


def format_rate(bytes_per_s: float) -> str:
    """ "13.1 GB/s"."""
    return _scale(bytes_per_s, 1000, ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"])


def format_seconds(seconds: float) -> str:
    """ "230 ms", "1.25 s", "3 m 20 s"."""
    magnitude = abs(seconds)
    if magnitude >= 60:
        whole = round(seconds)
        hours, rest = divmod(whole, 3600)
        minutes, secs = divmod(rest, 60)
        return f"{hours} h {minutes} m" if hours else f"{minutes} m {secs} s"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if magnitude >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns" if seconds else "0 s"


def format_percent(share: float) -> str:
    """ "37.4 %" from 0.374."""
    return f"{share * 100:.1f} %"


def _scale(value: float, base: int, units: list[str]) -> str:
    index = 0
    while abs(value) >= base and index < len(units) - 1:
        value /= base
        index += 1
    number = f"{value:.0f}" if index == 0 else f"{value:.1f}"
    return f"{number} {units[index]}".rstrip()
