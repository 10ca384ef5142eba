"""The data files of the shipped workloads: names, checksums, and what is said without a network."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmc.bench import data
from lmc.bench.sources import find_file
from lmc.cli import app
from lmc.errors import RunError, WorkloadError

WORKLOADS = Path(__file__).parents[2] / "workloads"


def test_every_file_that_a_workload_names_is_known() -> None:
    for file in WORKLOADS.glob("*.yaml"):
        text = file.read_text()
        named = {part.split("/")[1].split(",")[0].split("}")[0].split()[0] for part in text.split("$LMC_DATA_DIR")[1:]}
        known = {one.file for one in data.FILES.values() if file.stem in one.workloads.split(", ")}
        assert named == known, file.name


def test_a_fetched_file_is_checked_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMC_DATA_DIR", str(tmp_path / "data"))
    content = b'{"question": "1 + 1"}\n'
    made = dataclasses.replace(data.FILES["gsm8k"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(data.FILES, "gsm8k", made)
    with pytest.raises(WorkloadError, match="`lmc data fetch gsm8k` gets it"):
        find_file("$LMC_DATA_DIR/gsm8k_test.jsonl.gz", tmp_path)
    with pytest.raises(RunError, match=r"the content has the checksum .*; nothing was kept"):
        data.fetch("gsm8k", lambda url: content + b"x")
    assert not (tmp_path / "data").exists()
    place = data.fetch("gsm8k", lambda url: content)
    assert gzip.decompress(place.read_bytes()) == content
    assert find_file("$LMC_DATA_DIR/gsm8k_test.jsonl.gz", tmp_path) == place


def test_without_the_variable_the_cache_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMC_DATA_DIR", raising=False)
    monkeypatch.setenv("LMC_CACHE_HOME", str(tmp_path))
    assert data.data_folder() == tmp_path / "data"


def test_what_cannot_be_had_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in (("tau2", "from sierra-research/tau2-bench"), ("nothing", "there are gsm8k, xquad")):
        with pytest.raises((RunError, WorkloadError), match=words) as told:
            data.fetch(name)
        assert "\n" not in str(told.value)
    nowhere = dataclasses.replace(data.FILES["gsm8k"], url="http://127.0.0.1:9/x")
    monkeypatch.setitem(data.FILES, "gsm8k", nowhere)
    result = CliRunner().invoke(app, ["data", "fetch", "gsm8k"])
    assert "cannot download http://127.0.0.1:9/x: " in str(result.exception)
    assert "copy the file of another machine" in str(result.exception)


def test_licences_are_listed() -> None:
    listed = CliRunner().invoke(app, ["data", "list"], env={"COLUMNS": "200"}).output
    assert all(one.name in listed and one.licence in listed for one in data.FILES.values())
