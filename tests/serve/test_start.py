from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest

from lmc.cache.tiers.room import usable_disk
from lmc.errors import ConfigError
from lmc.serve import start
from lmc.serve.start import ServeOptions, _describe_cache, serve
from lmc.units import format_size
from tests.cache.instance import CHUNK_BYTES, Instance, settings
from tests.serve.test_run_engine import engine
from tests.services import LOCAL, free_port


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_ready_line_tells_the_tiers_over_all_ranks(tmp_path, num_ranks):
    instance = Instance(settings(metrics_enabled=True, disk_path=tmp_path), num_ranks)
    try:
        url = instance.scheduler.metrics_url
        host, disk = (slots for _, slots in instance.scheduler.directory.usage().values())
        size = format_size(host * CHUNK_BYTES * num_ranks)
        expected = (
            f"host {size} ({host:,} chunks), disk 1.0 MiB ({disk:,} chunks)"  # the disk is counted in bytes of files
        )
        config = settings(metrics_enabled=True, metrics_port=int(url.split(":")[2].removesuffix("/metrics")))
        assert _describe_cache(config, range(1)) == f'metrics={url} tiers="{expected}"'
    finally:
        instance.close()


def test_the_ready_line_tells_a_cache_that_does_not_answer() -> None:
    config = settings(metrics_enabled=True, metrics_port=free_port())
    assert _describe_cache(config, range(1)).startswith("cache=FAILED (")
    assert _describe_cache(settings(), range(1)) == "cache=on metrics=off"
    assert _describe_cache(None, range(1)) == "cache=off"


def test_the_ready_line_of_several_engines_names_the_first_and_tells_how_many() -> None:
    instance = Instance(settings(metrics_enabled=True))
    try:
        port = int(str(instance.scheduler.metrics_url).split(":")[2].removesuffix("/metrics"))
        line = _describe_cache(settings(metrics_enabled=True, metrics_port=port - 4), range(4, 6))
        assert line.startswith(f"metrics=http://{LOCAL}:{port}/metrics ") and line.endswith(" engines=2")
    finally:
        instance.close()


def test_the_ready_line_where_the_tiers_are_told_for_a_token_only() -> None:
    """lmc serve has the token; where there is none, it says where Prometheus may ask."""
    for token, told in (("hush", True), (None, False)):
        values = {"metrics_enabled": True, "metrics_host": "0.0.0.0", "admin_token": token}
        instance = Instance(settings(**values))
        try:
            port = int(str(instance.scheduler.metrics_url).split(":")[2].removesuffix("/metrics"))
            line = _describe_cache(settings(**values, metrics_port=port), range(1))
            assert line.startswith(f"metrics=http://0.0.0.0:{port}/metrics") and ("tiers=" in line) is told
            assert "hush" not in line
        finally:
            instance.close()


def test_the_ready_file_is_there_only_while_the_engine_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, file = free_port(), tmp_path / "run" / "ready"
    file.parent.mkdir()
    file.write_text("of an engine that was killed")
    told: list[tuple[str, str]] = []

    def begin(*_: object) -> object:
        assert not file.exists()
        return engine(LOCAL, port)

    def say(line: str) -> None:
        told.append((line, file.read_text()))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(start, "engine_command", begin)
    monkeypatch.setattr(start, "check_engine", lambda *_: None)
    options = ServeOptions("smollm2-135m-instruct", port=port, cache=False, ready_timeout=60, ready_file=file)
    assert serve(options, settings(), say) == 0
    line = f"ready url=http://{LOCAL}:{port}/v1 cache=off"
    assert told == [(line, f"{line}\n")]
    assert not file.exists()


def test_a_ready_file_that_cannot_be_is_refused_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = ServeOptions("m", port=free_port(), cache=False, ready_file=tmp_path / "file" / "ready")
    with pytest.raises(ConfigError, match=r"--ready-file .* cannot be written"):
        serve(options, settings(), print)


def test_a_disk_capacity_without_room_is_lowered_and_both_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(disk_path=tmp_path / "kv", disk_capacity=1 << 60)
    with caplog.at_level(logging.WARNING):
        fitting = usable_disk(config)
    assert 0 < fitting.disk.capacity < 1 << 60
    assert "disk.capacity 1024.0 PiB is more than" in caplog.text
    assert f"it is {format_size(fitting.disk.capacity)} now" in caplog.text
