"""What `lmc doctor` says of a machine."""

from __future__ import annotations

import importlib.metadata
import json
import socket
from email.message import Message
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmc.cli import app
from lmc.memory import Memory
from lmc.serve import doctor
from tests import services


def findings(*options: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = CliRunner().invoke(app, ["doctor", "--json", *options])
    return result.exit_code, {found["what"]: found for found in json.loads(result.output)}


def test_a_machine_that_is_all_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SLOW_DISK", 0.0)
    monkeypatch.setattr(doctor, "LEAST_MEMORY", 0)
    monkeypatch.setattr(doctor, "SHM_PER_GPU", 0)
    code, found = findings("--disk-path", str(tmp_path / "new" / "kv"), "--port", str(services.free_port()))
    assert (code, [f for f in found.values() if f["remedy"]]) == (0, [])
    assert "vllm" in found["engine"]["seen"] or "sglang" in found["engine"]["seen"]
    assert "written and synced" in found["disk speed"]["seen"]
    assert list(tmp_path.iterdir()) == [], "the folders that were made to try the disk are removed"
    text = CliRunner().invoke(app, ["doctor", "--port", str(services.free_port())]).output
    assert text.count("ok ") == len(text.splitlines())


def test_a_disk_folder_that_is_there_stays(tmp_path: Path) -> None:
    _, found = findings("--disk-path", str(tmp_path))
    assert "written and synced" in found["disk speed"]["seen"]
    assert tmp_path.is_dir()


def test_what_is_wrong_comes_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(doctor, "available_memory", lambda: Memory(1 << 30, 2 << 30, "/sys/fs/cgroup/memory.max"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, found = findings(
            "--disk-path",
            str(tmp_path / "file" / "kv"),
            "--port",
            str(port),
            "--redis-url",
            "redis://:secret@127.0.0.1:9",
        )
    assert code == 1
    assert "/sys/fs/cgroup/memory.max" in found["memory"]["seen"] and found["memory"]["remedy"]
    assert (found["port"]["seen"], found["port"]["remedy"]) == (f"{port} is in use", "give another one with --port")
    assert "--disk-path" in found["disk tier"]["remedy"]
    assert "does not answer" in found["redis tier"]["seen"]
    assert "secret" not in str(found)


@pytest.mark.service
def test_a_redis_that_answers(tmp_path: Path) -> None:
    with services.redis_server(tmp_path) as server:
        _, found = findings("--redis-url", server.url)
    assert found["redis tier"]["seen"] == "answers"


@pytest.mark.service
def test_a_mooncake_master_that_answers_and_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with services.mooncake_store(tmp_path, segment=0) as store:
        for name, value in (("MASTER", store.address), ("METADATA", store.metadata), ("TIMEOUT", "20")):
            monkeypatch.setenv(f"LMC_MOONCAKE_{name}", value)
        assert findings()[1]["mooncake tier"]["seen"] == "answers"
    monkeypatch.setenv("LMC_MOONCAKE_TIMEOUT", "1")
    code, found = findings()
    assert code == 1 and "cannot connect to the master" in found["mooncake tier"]["seen"]


def test_the_other_package_called_lmc_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Message()
    other["Version"], other["Summary"] = "0.2.2", "Logarithmantic Monte Carlo"
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: other)
    _, found = findings()
    assert "another project called lmc is installed (0.2.2" in found["package"]["seen"]
    assert "pip uninstall lmc" in found["package"]["remedy"]
