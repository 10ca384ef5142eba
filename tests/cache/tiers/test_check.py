"""Values that the schema allows and nobody means."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmc.cache.config import CacheConfig
from lmc.cache.tiers.check import check_meant
from lmc.cli import app


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("load_deadline: 5000", "load_deadline is 1 h 23 m, at most 10 m 0 s can be meant"),
        ("load_deadline: 0", "load_deadline is 0"),
        ("lookup_deadline: 0ms", "lookup_deadline is 0"),
        ("close_timeout: 100h", "close_timeout is 100 h"),
        ("ttl: 0", "ttl is 0, which drops every chunk"),
        ("redis: {ttl: 0}", "redis.ttl is 0"),
        ("disk: {path: /kv, capacity: 1KiB}", "disk.capacity is 1.0 KiB, which holds no chunk"),
        ("host: {capacity: 9 kB}", "host.capacity is 8.8 KiB, which holds no chunk"),
        ("s3: {bucket: b, endpoint: store}", "s3.endpoint 'store' is no address"),
        ("redis: {url: 'http://cache'}", "redis"),
    ],
)
def test_they_are_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "lmc.yaml"
    file.write_text(text)
    result = CliRunner().invoke(app, ["config", "check", str(file)])
    assert result.exit_code and said in str(result.exception) and "\n" not in str(result.exception)


def test_the_defaults_are_meant() -> None:
    check_meant(CacheConfig())
    check_meant(CacheConfig.model_validate({"close_timeout": 0, "ttl": "1h", "host": {"capacity": "1MiB"}}))
