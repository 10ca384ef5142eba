"""One engine process: start it, wait until it answers, pass signals on, return its exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lmc.errors import ConfigError, EngineError
from lmc.serve.command import EngineCommand

_POLL_SECONDS = 0.2
_STOP_SECONDS = 20.0


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def hold_port(host: str, port: int, what: str) -> socket.socket:
    """A socket on the port (0: a free one) that keeps others off it until closed; servers, which set SO_REUSEADDR, can listen there.

    Raises ConfigError when the port cannot be had.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise ConfigError(f"cannot listen on {host}:{port} for {what}: {error.strerror}; choose another port") from None
    return held


def run_engine(command: EngineCommand, url: str, ready_timeout: float, on_ready: Callable[[], None]) -> int:
    """Run the engine until it ends; SIGINT and SIGTERM stop it cleanly. Returns its exit code, or 0 after a clean stop.

    Raises EngineError when it does not answer within ready_timeout seconds.
    """
    process = subprocess.Popen(
        command.arguments, env={**os.environ, **command.environment}, start_new_session=True, stdin=subprocess.DEVNULL
    )
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if process.poll() is None:
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    with _signals(stop):
        try:
            if _wait_ready(process, url + command.health_path, ready_timeout, lambda: stopping):
                on_ready()
            code = _wait_end(process, lambda: stopping)
        finally:
            _kill_group(process)
    return 0 if stopping else code


def _wait_ready(process: subprocess.Popen[bytes], url: str, timeout: float, stopping: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + timeout
    while process.poll() is None and not stopping():
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            pass  # not listening yet
        if time.monotonic() > deadline:
            raise EngineError(f"the engine did not answer {url} within {timeout:.0f} s; its log is above")
        time.sleep(_POLL_SECONDS)
    return False


def _wait_end(process: subprocess.Popen[bytes], stopping: Callable[[], bool]) -> int:
    stop_by: float | None = None
    while True:
        try:
            return process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if stopping():
                stop_by = stop_by or time.monotonic() + _STOP_SECONDS
                if time.monotonic() > stop_by:
                    process.kill()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Engines leave workers behind when they are killed; nothing of the group may outlive us."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # all gone
    process.wait()


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
