"""Starts an S3 server (moto's) for one arm: it has one empty bucket, listens on a port of this machine, and is stopped afterwards.

It is written in Python and only stands in for an object store: the bytes and the code path are real, the times say nothing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from lmc.errors import EngineError
from lmc.serve.ports import free_port

BUCKET = "lmc"
START_S = 60.0
LOCAL = "127.0.0.1"


@asynccontextmanager
async def started_s3(folder: Path) -> AsyncIterator[str]:
    """Yields the endpoint of a running server that has the bucket BUCKET. Raises EngineError."""
    if importlib.util.find_spec("moto") is None:
        raise EngineError("this arm needs an S3 server; pip install 'moto[server]', which has one")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port(LOCAL)
    endpoint = f"http://{LOCAL}:{port}"
    with (folder / "s3.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "moto.server", "-H", LOCAL, "-p", str(port), stdout=log, stderr=log
        )
        try:
            end = time.monotonic() + START_S
            while not await _makes_bucket(endpoint):
                if process.returncode is not None or time.monotonic() > end:
                    raise EngineError(f"the S3 server did not start (log: {folder / 's3.log'})")
                await asyncio.sleep(0.1)
            yield endpoint
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _makes_bucket(endpoint: str) -> bool:
    try:
        async with aiohttp.ClientSession() as http, http.put(f"{endpoint}/{BUCKET}") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
