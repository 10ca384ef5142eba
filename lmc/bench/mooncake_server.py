"""Starts a Mooncake master for one arm: it knows of no memory, so the arm's instances bring their own (mooncake.segment)."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lmc.errors import EngineError
from lmc.serve.ports import free_port

START_S = 30.0
LOCAL = "127.0.0.1"


@asynccontextmanager
async def started_mooncake(folder: Path) -> AsyncIterator[str]:
    """Yields the address of a running master. Raises EngineError."""
    spec = importlib.util.find_spec("mooncake")
    if spec is None or spec.origin is None:
        raise EngineError("this arm needs a Mooncake master; pip install 'lmc-kv[mooncake]', which has one")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port(LOCAL)
    log = folder / "mooncake.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            str(Path(spec.origin).parent / "mooncake_master"),
            f"--rpc_address={LOCAL}",
            f"--rpc_port={port}",
            f"--metrics_host={LOCAL}",
            f"--metrics_port={free_port(LOCAL)}",
            stdout=output,
            stderr=output,
        )
        try:
            end = asyncio.get_running_loop().time() + START_S
            while not await _listens(port):
                if process.returncode is not None or asyncio.get_running_loop().time() > end:
                    raise EngineError(f"the Mooncake master did not start (log: {log})")
                await asyncio.sleep(0.05)
            yield f"{LOCAL}:{port}"
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOCAL, port)
    except OSError:
        return False
    writer.close()
    return True
