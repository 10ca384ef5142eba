"""`lmc node` from its first line to its last, and one clear line for each thing that can be wrong."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from lmc.cache.config import CacheConfig
from lmc.cache.node import start
from lmc.cache.node.domain import DomainName, OpenedTiers, open_rank
from lmc.cache.node.start import serve_node
from lmc.errors import ConfigError, TierError
from lmc.memory import Memory
from tests.cache.instance import prompt, settings
from tests.cache.node.attached import Attached, Process, attached_settings, node_here
from tests.services import wait_until

SMALL = {"host_capacity": "1MiB"}


def refusal(path: Path, **values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        serve_node(settings(**{**SMALL, **values}), path, print)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_node_says_when_it_is_ready_and_stops_when_told(tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        os.environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        try:
            node = Process(tmp_path / "node.sock")
        finally:
            del os.environ["NOTIFY_SOCKET"]
        assert (
            node.ready == f"ready socket={tmp_path}/node.sock memory=4.0 MiB metrics=" + node.ready.split("metrics=")[1]
        )
        assert systemd.recv(100) == b"READY=1"
        mode = (tmp_path / "node.sock").stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
        engine = node.engine()
        engine.serve(prompt(1, 50))
        code, errors = node.stop()
        assert code == 0, errors
        assert systemd.recv(100) == b"STOPPING=1"
        assert not (tmp_path / "node.sock").exists()
        engine.close()


def test_a_stop_writes_what_is_on_its_way_to_disk(tmp_path: Path) -> None:
    lines = ("chunk_tokens: 8", "host:", "  capacity: 4MiB", "disk:", f"  path: {tmp_path}/disk", "  capacity: 1MiB")
    node = Process(tmp_path / "node.sock", *lines)
    engine = node.engine()
    for number in range(10):
        engine.serve(prompt(number, 60))
    assert node.stop()[0] == 0
    engine.close()
    assert sum(1 for _ in (tmp_path / "disk").glob("v*/*/r0/??/*")) == 70


def test_a_socket_left_by_a_killed_node_is_replaced(tmp_path: Path) -> None:
    node = Process(tmp_path / "node.sock")
    node.kill()
    assert (tmp_path / "node.sock").exists()
    second = Process(tmp_path / "node.sock")
    assert second.ready.startswith("ready")
    assert "another node serves it" in refusal(tmp_path / "node.sock")
    assert second.stop()[0] == 0


def test_what_is_at_the_path_is_not_taken_away(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "this is no socket" in refusal(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as other:
        other.bind(str(tmp_path / "other"))
        other.listen(1)
        assert "another program listens there" in refusal(tmp_path / "other")
        assert (tmp_path / "other").exists()


def test_other_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "at most 107 bytes" in refusal(tmp_path / ("x" * 120))
    assert "there is no group 'nobody-has-this'" in refusal(tmp_path / "s", node_group="nobody-has-this")
    assert "--socket /proc/node.sock" in refusal(Path("/proc/node.sock"))
    monkeypatch.setattr(start, "available_memory", lambda: Memory(1 << 19, 1 << 19, "the machine"))
    assert "host.capacity 1.0 MiB is more than the 512.0 KiB that are free" in refusal(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel keeps others from the socket; where it does not, the node does. The node's own user stands for another one here."""
    with node_here(tmp_path / "node.sock") as here:
        monkeypatch.setattr("lmc.cache.node.server.os.getuid", lambda: 12345)
        monkeypatch.setattr("lmc.cache.node.server._ROOT", 54321)
        engine = here.engine()
        assert engine.serve(prompt(1, 50)).miss == "node away"
        monkeypatch.undo()
        engine.wait_attached()


def test_engines_that_do_not_fit_are_told_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with node_here(tmp_path / "node.sock", chunk_tokens=16) as here:
        engine = here.engine()
        assert engine.serve(prompt(1, 50)).loaded == 0
        text = "the engine has chunks of 8 tokens, the node of 16: give both the same chunk_tokens"
        assert sum(text in record.getMessage() for record in caplog.records if "link" in record.name) == 1


def test_without_a_node_the_engine_says_so_once_and_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Attached(attached_settings(tmp_path / "none.sock"))
    for _ in range(3):
        assert engine.serve(prompt(1, 50)).miss == "node away"
    lines = [record.getMessage() for record in caplog.records if "none.sock" in record.getMessage()]
    assert len(lines) == 2  # of the worker and of the scheduler
    assert all("there is no socket" in line and "start `lmc node --socket" in line for line in lines)
    engine.close()


def test_a_signal_during_traffic_ends_the_node_in_order(tmp_path: Path) -> None:
    node = Process(tmp_path / "node.sock")
    engine = node.engine()
    for number in range(5):
        engine.serve(prompt(number, 60), settle=False)
    node.process.send_signal(signal.SIGINT)
    _, errors = node.process.communicate(timeout=60)
    assert node.process.returncode == 0, errors
    assert "Traceback" not in errors
    engine.close()


class Exhausted:
    """A listener in a process that has no descriptor left, until it has some."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.calls = 0
        self.over = False

    def accept(self) -> tuple[socket.socket, object]:
        self.calls += 1
        if not self.over:
            raise OSError(errno.EMFILE, "Too many open files")
        return self.listener.accept()

    def fileno(self) -> int:
        return self.listener.fileno()


def test_without_descriptors_the_node_tries_once_in_a_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with node_here(tmp_path / "node.sock") as here:
        node, tick, ticks = here.node, here.node._tick, []
        listener = Exhausted(node._listener)
        monkeypatch.setattr(node, "_listener", listener)
        monkeypatch.setattr(node, "_tick", lambda now: (ticks.append(now), tick(now)))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting:
            waiting.connect(str(here.path))
            wait_until(lambda: listener.calls >= 5, "the node gave up")
            calls = listener.calls
            assert calls <= len(ticks) + 2
        listener.over = True
        here.engine().wait_attached()
    assert sum("Too many open files" in record.getMessage() for record in caplog.records) == 1


def test_each_namespace_has_a_lookup_trace_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the first could not be opened at once, and is opened after the second."""
    second_is_open, failures = threading.Event(), [TierError("disk: it hangs")]

    def open_late(config: CacheConfig, name: DomainName, rank: int, host_slots: int) -> OpenedTiers:
        if name.namespace.model == "a" and failures:
            assert second_is_open.wait(60)
            raise failures.pop()
        return open_rank(config, name, rank, host_slots)

    monkeypatch.setattr("lmc.cache.node.server.open_rank", open_late)
    with node_here(tmp_path / "node.sock", record=tmp_path / "trace.jsonl") as here:
        with ThreadPoolExecutor(1) as pool:
            one = pool.submit(here.engine, model="a")
            wait_until(lambda: len(here.node._opening) == 1, "the first never came")
            other = here.engine(model="b")
            other.wait_attached()
            second_is_open.set()
            one.result().wait_attached()
        records = [domain.config.record for domain in here.node.domains.values()]
        assert len(records) == len(set(records)) == 2
