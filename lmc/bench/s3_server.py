"""Starts an S3 server (moto's) for one arm: it has one empty bucket, listens on a port of this machine, and is stopped afterwards.

It is written in Python and only stands in for an object store: the bytes and the code path are real, the times say nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp

from lmc.bench.server_process import LOCAL, running_server
from lmc.errors import EngineError
from lmc.serve.ports import free_port

BUCKET = "lmc"
START_S = 60.0


@asynccontextmanager
async def started_s3(folder: Path) -> AsyncIterator[str]:
    """Yields the endpoint of a running server that has the bucket BUCKET. Raises EngineError."""
    if importlib.util.find_spec("moto") is None:
        raise EngineError("this arm needs an S3 server; pip install 'moto[server]', which has one")
    port = free_port(LOCAL)
    endpoint = f"http://{LOCAL}:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", LOCAL, "-p", str(port)]
    is_ready = partial(_makes_bucket, endpoint)
    async with running_server("the S3 server", command, folder / "s3.log", is_ready, START_S):
        yield endpoint


async def _makes_bucket(endpoint: str) -> bool:
    try:
        async with aiohttp.ClientSession() as http, http.put(f"{endpoint}/{BUCKET}") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
