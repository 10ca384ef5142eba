"""Checks print JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from lmc.cache.settings import all_settings
from lmc.cli import app


def printed(*words: str) -> dict[str, list[dict[str, object]]]:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    found: dict[str, list[dict[str, object]]] = json.loads(result.stdout)
    return found


def test_the_settings_in_force_with_their_origins_and_without_secrets(tmp_path: Path) -> None:
    file = tmp_path / "lmc.yaml"
    file.write_text("redis: {url: 'redis://:hush@h:1'}\nhost: {capacity: 1GiB}\ndisk: {path: /kv}\n")
    settings: dict[str, object] = dict(printed("config", "check", str(file), "--json"))
    assert list(settings) == [setting.key for setting in all_settings()]
    assert settings["host.capacity"] == {"value": 1 << 30, "origin": f"file {file}"}
    assert settings["disk.path"] == {"value": "/kv", "origin": f"file {file}"}
    assert settings["redis.url"] == {"value": "(set)", "origin": f"file {file}"}
    assert settings["policy"] == {"value": "lru", "origin": "default"}


def test_what_a_workload_holds() -> None:
    tables = printed("bench", "check", "null", "--quick", "--json")
    parts, hits = tables.values()
    assert parts[0]["part"] == "random" and [row["hit (tokens)"] for row in hits] == [0, 0, 0, 0]
