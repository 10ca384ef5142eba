"""A machine that refuses threads or priorities, and a folder that refuses deletions for a while: failures of copies, never exceptions."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import threading
from pathlib import Path

import pytest

from lmc.cache.tiers.format import stored_bytes
from lmc.cache.tiers.late import wait_for
from lmc.cache.worker.block_copies import start_thread
from lmc.errors import TierError
from tests import services
from tests.cache.instance import CHUNK_BYTES, Instance, chunk_files, prompt, settings
from tests.faults.test_tier_disk import exit_status, in_child

TOKENS = prompt(1, 50)
SETPRIORITY = {"x86_64": 141, "aarch64": 140}


def deny(system_call: int) -> None:
    """A seccomp filter of this process that answers the call with EPERM."""
    libc = ctypes.CDLL(None, use_errno=True)
    steps = [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, system_call),
        (0x06, 0, 0, 0x00050000 | errno.EPERM),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    described = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(program)))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, described, 0, 0) == 0


def test_a_container_that_refuses_setpriority(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run() -> None:
        deny(SETPRIORITY[platform.machine()])
        with pytest.raises(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 10)
        instance = Instance(settings(disk_path=tmp_path))
        instance.serve(TOKENS)
        assert len(chunk_files(tmp_path)) == 6
        assert "writes run at the engine's own priority" in caplog.text
        instance.close()

    assert exit_status(in_child(run)) == 0


def test_a_limit_of_processes_that_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Injected: root is under no such limit but a container's, which would take the other tests' threads, too."""
    first = Instance(settings(disk_path=tmp_path))
    first.serve(TOKENS)
    first.close()
    instance = Instance(settings(disk_path=tmp_path))

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):  # and not at the first load in the background
            start_thread("lmc-load")
        with pytest.raises(TierError, match="opening: cannot start a thread"):
            wait_for(list, 1.0, "opening")
        assert instance.serve(TOKENS).miss == "load failed"
        assert instance.serve(prompt(2, 50)).loaded == 0
        assert instance.serve(prompt(2, 50)).sources == {"host": 48}
    assert "cannot start a thread; raise the limit of processes" in caplog.text
    assert instance.metric("failure_causes_total", operation="write", tier="disk", cause="error") > 0
    instance.serve(prompt(2, 50))
    assert len(chunk_files(tmp_path)) >= 6
    instance.close()


def test_after_a_read_only_remount_the_folder_returns_below_its_capacity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remount is injected: tests may not mount."""
    capacity = 20 * stored_bytes(CHUNK_BYTES)
    instance = Instance(settings(disk_path=tmp_path, disk_capacity=capacity, host_capacity=16 * CHUNK_BYTES))
    for seed in range(4):
        instance.serve(prompt(seed, 50))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        for call in ("unlink", "rename"):
            patch.setattr(os, call, refuse)
        plain = os.open
        patch.setattr(os, "open", lambda p, f, *a, **o: refuse() if f & os.O_CREAT else plain(p, f, *a, **o))
        for seed in range(10, 16):
            instance.serve(prompt(seed, 50))
    before = instance.metric("written_chunks_total", tier="disk")

    def writes_again() -> bool:
        instance.serve(prompt(20 + int(instance.metric("requests_total")), 50))
        return instance.metric("written_chunks_total", tier="disk") >= before + 18

    services.wait_until(writes_again, "writes after the remount")
    assert sum(path.stat().st_size for path in chunk_files(tmp_path)) <= capacity
    instance.close()
    again = Instance(settings(disk_path=tmp_path, disk_capacity=capacity))
    assert again.scheduler.directory.usage()["disk"][0] == len(chunk_files(tmp_path))
    again.close()
