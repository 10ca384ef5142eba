"""Starts an `lmc node` for the engines of one arm: it is empty, listens on a socket of its own, and is stopped afterwards."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lmc.errors import EngineError

START_S = 60.0


@asynccontextmanager
async def started_node(folder: Path, settings: Path) -> AsyncIterator[str]:
    """Yields its socket. settings: the arm's file; the pages of its engines have all that is counted. Raises EngineError."""
    log = folder / "node.log"
    # The path of a socket has a short limit, so the socket is not in the arm's folder.
    with tempfile.TemporaryDirectory(prefix="lmc-") as short, log.open("wb") as sink:
        socket = Path(short) / "node.sock"
        command = [sys.executable, "-m", "lmc", "node", "--config", str(settings), "--socket", str(socket)]
        environment = {**os.environ, "LMC_METRICS_ENABLED": "false"}
        process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=PIPE, stderr=sink, env=environment
        )
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), START_S)
            if not line.startswith(b"ready "):
                raise EngineError(f"lmc node did not start (log: {log})")
            yield str(socket)
        except TimeoutError as error:
            raise EngineError(f"lmc node was not ready within {START_S:g} s (log: {log})") from error
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
