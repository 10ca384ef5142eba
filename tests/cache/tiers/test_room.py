"""disk.capacity and the room of the file system, whose size is set here."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmc.cache.tiers import room
from lmc.cache.tiers.room import usable_disk, within_room
from lmc.errors import ConfigError
from tests.cache.instance import settings

GIB = 1 << 30


@pytest.fixture(autouse=True)
def twenty_gib_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=20 * GIB))


def stored(folder: Path, num_bytes: int) -> None:
    chunks = folder / "v4" / "a-namespace" / "r0" / "ab"
    chunks.mkdir(parents=True)
    with (chunks / ("ab" * 32)).open("wb") as file:
        file.truncate(num_bytes)


def test_a_capacity_that_fits_stays(tmp_path: Path) -> None:
    config = settings(disk_path=tmp_path, disk_capacity=19 * GIB)
    assert within_room(config) == (config, "")
    assert within_room(settings()) == (settings(), "")


def test_a_capacity_that_does_not_fit_leaves_a_twentieth_free(tmp_path: Path) -> None:
    fitting, lowered = within_room(settings(disk_path=tmp_path, disk_capacity=100 * GIB))
    assert fitting.disk.capacity == 19 * GIB
    assert "disk.capacity 100.0 GiB" in lowered and "20.0 GiB are free" in lowered and "it is 19.0 GiB now" in lowered


def test_what_lies_in_the_folder_is_room_for_what_comes(tmp_path: Path) -> None:
    stored(tmp_path, 81 * GIB)
    config = settings(disk_path=tmp_path, disk_capacity=100 * GIB)
    assert within_room(config) == (config, "")
    fitting, lowered = within_room(settings(disk_path=tmp_path, disk_capacity=101 * GIB))
    assert (fitting.disk.capacity, bool(lowered)) == (100 * GIB, True)


def test_where_no_chunk_fits_there_is_no_disk_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert usable_disk(settings(disk_path=tmp_path / "new")).disk.path is None
    with pytest.raises(ConfigError, match="no chunk fits"):
        usable_disk(settings(disk_path=tmp_path / "new", strict=True))


def test_a_disk_that_does_not_answer_does_not_hold_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(room, "_PATIENCE", 0.05)
    monkeypatch.setattr(room, "list_namespaces", lambda folder: [answers.wait(60)][:0])
    config = settings(disk_path=tmp_path, disk_capacity=100 * GIB)
    try:
        assert usable_disk(config) == config
    finally:
        answers.set()
