"""Starts a Mooncake master for one arm: it knows of no memory, so the arm's instances bring their own (mooncake.segment)."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from lmc.bench.server_process import LOCAL, running_server
from lmc.errors import EngineError
from lmc.serve.ports import free_port

START_S = 30.0


@asynccontextmanager
async def started_mooncake(folder: Path) -> AsyncIterator[str]:
    """Yields the address of a running master. Raises EngineError."""
    spec = importlib.util.find_spec("mooncake")
    if spec is None or spec.origin is None:
        raise EngineError("this arm needs a Mooncake master; pip install 'lmc-kv[mooncake]', which has one")
    port = free_port(LOCAL)
    command = [
        str(Path(spec.origin).parent / "mooncake_master"),
        f"--rpc_address={LOCAL}",
        f"--rpc_port={port}",
        f"--metrics_host={LOCAL}",
        f"--metrics_port={free_port(LOCAL)}",
    ]
    is_ready = partial(_listens, port)
    async with running_server("the Mooncake master", command, folder / "mooncake.log", is_ready, START_S):
        yield f"{LOCAL}:{port}"


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOCAL, port)
    except OSError:
        return False
    writer.close()
    return True
