"""Starts an `lmc node` for the engines of one arm: it is empty, listens on a socket of its own, and is stopped afterwards."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lmc.bench.server_process import running_server

START_S = 60.0


@asynccontextmanager
async def started_node(folder: Path, settings: Path) -> AsyncIterator[str]:
    """Yields its socket. settings: the arm's file; the pages of its engines have all that is counted. Raises EngineError."""
    log = folder / "node.log"

    async def has_said_so() -> bool:
        return any(line.startswith(b"ready ") for line in log.read_bytes().splitlines())

    # The path of a socket has a short limit, so the socket is not in the arm's folder.
    with tempfile.TemporaryDirectory(prefix="lmc-") as short:
        socket = Path(short) / "node.sock"
        command = [sys.executable, "-m", "lmc", "node", "--config", str(settings), "--socket", str(socket)]
        environment = {**os.environ, "LMC_METRICS_ENABLED": "false"}
        async with running_server("lmc node", command, log, has_said_so, START_S, environment):
            yield str(socket)
