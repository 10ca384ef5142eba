"""A folder's weights are named by every byte, and a digest is not believed for longer than its file stays as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmc import weights
from lmc.errors import ModelError
from lmc.weights import unchanged_since_start, weights_digest

SIZE = 9 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose one file is old enough for its digest to be kept."""
    monkeypatch.setenv("LMC_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_SETTLED_SECONDS", -1.0)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"hidden_size": 8}))
    (model / "model.safetensors").write_bytes(bytes(SIZE))
    return model


def change(file: Path, place: int, value: bytes = b"x") -> None:
    """As an editor would that puts the old modification time back."""
    stat = file.stat()
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(value)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("place", [0, 64 * 1024, 200_000, SIZE // 2 + 1, SIZE - 1])
def test_every_byte_of_the_weights_counts(folder: Path, place: int) -> None:
    before = weights_digest(folder)
    change(folder / "model.safetensors", place)
    assert weights_digest(folder) != before
    change(folder / "model.safetensors", place, b"\0")
    assert weights_digest(folder) == before


def test_a_digest_is_read_again_instead_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights_digest(folder)
    monkeypatch.setattr(weights, "_PIECE_BYTES", 0)  # from now on nothing can be read
    assert weights_digest(folder) == first
    (folder / "config.json").write_text(json.dumps({"hidden_size": 9}))
    assert weights_digest(folder) != first


def test_a_file_that_has_just_changed_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again without its times doing so: they have a granularity."""
    monkeypatch.setattr(weights, "_SETTLED_SECONDS", 1e9)
    weights_digest(folder)
    assert not list(folder.parent.glob("cache/weights/*"))


@pytest.mark.parametrize("entry", ["", "[]", "{}", '{"version": 1, "digest": "00"}', '{"version": null, "digest": 7}'])
def test_a_damaged_entry_is_not_believed(folder: Path, entry: str) -> None:
    first = weights_digest(folder)
    (kept,) = folder.parent.glob("cache/weights/*")
    kept.write_text(entry)
    assert weights_digest(folder) == first
    assert json.loads(kept.read_text())["digest"]


def test_a_file_that_grows_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown: list[int] = []

    def written_to(self: object, count: int) -> None:
        if not grown:
            with (folder / "model.safetensors").open("ab") as stream:
                grown.append(stream.write(b"more"))

    monkeypatch.setattr(weights._Progress, "add", written_to)
    monkeypatch.setattr(weights, "_PIECE_BYTES", SIZE)
    with pytest.raises(ModelError, match="written to while it was read"):
        weights_digest(folder)


def test_a_folder_without_weights_has_no_digest(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        weights_digest(folder)


def test_only_files_that_are_older_than_the_process_can_be_what_it_has_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not unchanged_since_start(folder)  # it was made by this very process
    now = (folder / "model.safetensors").stat().st_ctime
    monkeypatch.setattr(weights, "_process_start", lambda: now + 1.0)
    assert unchanged_since_start(folder)
    monkeypatch.setattr(weights, "_process_start", lambda: now)
    assert not unchanged_since_start(folder)


def test_a_model_that_is_complete_when_the_process_begins_is_older_than_it(folder: Path) -> None:
    """The kernel rounds the start of a process down to a tick: for ten milliseconds every file seemed to be newer."""
    asks = "import sys, pathlib; from lmc.weights import unchanged_since_start; print(unchanged_since_start(pathlib.Path(sys.argv[1])))"
    for number in range(5):
        (folder / "model.safetensors").write_bytes(bytes([number]))
        answer = subprocess.run([sys.executable, "-c", asks, str(folder)], capture_output=True, text=True, check=True)
        assert answer.stdout.strip() == "True"
