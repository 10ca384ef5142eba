"""SIGTERM unwinds a command, so that what it has started is stopped."""

from __future__ import annotations

import signal
import subprocess
import sys

COMMAND = """
import asyncio
import lmc.cli

async def body():
    try:
        print("started", flush=True)
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0)
        print("stopped", flush=True)

lmc.cli.app = lambda: asyncio.run(body())
lmc.cli.main()
"""


def test_sigterm_lets_a_command_stop_what_it_started() -> None:
    with subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "stopped\n"
    assert process.returncode == 128 + signal.SIGTERM
