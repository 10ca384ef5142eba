"""Runs a server that one arm gets for itself: it is started, waited for, and stopped afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from lmc.errors import EngineError

LOCAL = "127.0.0.1"
_STOP_S = 30.0  # then it is killed
_POLL_S = 0.05


@asynccontextmanager
async def running_server(
    what: str,
    command: Sequence[str],
    log: Path,
    is_ready: Callable[[], Awaitable[bool]],
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[None]:
    """What the server prints goes to `log`, whose folder is made. Raises EngineError if it is not ready within `seconds`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            end = time.monotonic() + seconds
            while not await is_ready():
                if process.returncode is not None or time.monotonic() > end:
                    raise EngineError(f"{what} did not start (log: {log})")
                await asyncio.sleep(_POLL_S)
            yield
        finally:
            await _stop(process)


async def _stop(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()
