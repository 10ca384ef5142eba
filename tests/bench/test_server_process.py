"""Servers of an arm that do not do what they should."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lmc.bench import server_process
from lmc.bench.server_process import running_server
from lmc.errors import EngineError

STUBBORN = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(600)"


async def test_a_server_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "_STOP_S", 0.2)
    log = tmp_path / "new" / "log"

    async def has_printed() -> bool:
        return log.read_text().endswith("\n")

    async with running_server("it", [sys.executable, "-c", STUBBORN], log, has_printed, 60):
        number = int(log.read_text())
        os.kill(number, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


async def test_a_server_that_ends_at_once_is_named_with_its_log(tmp_path: Path) -> None:
    async def never() -> bool:
        return False

    with pytest.raises(EngineError, match=r"the server did not start \(log: .*log\)"):
        async with running_server(
            "the server", [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", never, 60
        ):
            pass
