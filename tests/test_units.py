from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.errors import ConfigError
from lmc.units import format_count, format_percent, format_seconds, format_size, parse_count, parse_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8 GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("512", 512), (512, 512), ("1.5KiB", 1536), ("0", 0), ("3e3 B", 3000)],
)
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["8x", "-8", "", "GiB", "8 G i B", "nan", "inf", -1, float("nan"), True, "1.5", "0x10"]
)
def test_what_is_no_size(text: str | float) -> None:
    with pytest.raises(ConfigError, match=r"size|bytes"):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"), [("10ms", 0.01), ("1.5 s", 1.5), ("2h", 7200.0), (3, 3.0), ("250us", 2.5e-4)]
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "count"), [("1000", 1000), ("5k", 5000), ("3M", 3_000_000), ("1Mi", 2**20)])
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@given(st.integers(min_value=0, max_value=2**60))
def test_whole_bytes_survive(num_bytes: int) -> None:
    assert parse_size(str(num_bytes)) == num_bytes


def test_formats() -> None:
    assert format_size(1536) == "1.5 KiB"
    assert format_size(17) == "17 B"
    assert format_count(12031) == "12,031"
    assert format_count(144_793_823) == "144.8 M"
    assert format_seconds(0.23) == "230 ms"
    assert format_seconds(200) == "3 m 20 s"
    assert format_seconds(7300) == "2 h 1 m"
    assert format_percent(0.374) == "37.4 %"
