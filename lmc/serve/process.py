"""Runs one engine process: starts it, waits until it answers, passes signals on and returns its exit code.

No process of the engine outlives lmc.
"""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lmc.errors import EngineError
from lmc.serve.command import EngineCommand

_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 2.0
# Reads until its input ends, which is when this process is gone, in whatever way; then it ends the engine as a stop would.
_GUARD = """
read line
kill -s TERM "$1"
for second in $(seq "$2"); do
    kill -s 0 "$1" || break
    sleep 1
done
kill -s KILL -- "-$1"
"""


def run_engine(command: EngineCommand, address: str, ready_timeout: float, on_ready: Callable[[str], None]) -> int:
    """Run the engine until it ends; SIGINT and SIGTERM stop it cleanly. Returns its exit code, or 0 after a clean stop.

    address is host:port; on_ready gets it with the scheme that the engine speaks there. Raises EngineError when it does not answer within
    ready_timeout seconds, when it ends by itself with exit code 0, and when it does not stop in time.
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

    with _guarded(process, command.stop_seconds), _signals(stop):
        try:
            if command.health_path is not None:
                url = _wait_ready(process, address, command.health_path, ready_timeout, lambda: stopping)
                if url is not None:
                    on_ready(url)
            code = _wait_end(process, command.stop_seconds, lambda: stopping)
        finally:
            _kill_group(process)
    if stopping:
        return 0
    if code == 0:
        raise EngineError("the engine ended by itself, with exit code 0; its log is above")
    return code if code > 0 else 128 - code


def _wait_ready(
    process: subprocess.Popen[bytes], address: str, path: str, timeout: float, stopping: Callable[[], bool]
) -> str | None:
    """Wait until the engine answers and return its URL. Returns None when the engine ended first or was told to stop."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and not stopping():
        for scheme in ("http", "https"):  # its own arguments, a file of them among these, may have switched TLS on
            if _is_up(f"{scheme}://{address}{path}"):
                return f"{scheme}://{address}"
        if time.monotonic() > deadline:
            raise EngineError(
                f"the engine did not answer http(s)://{address}{path} within {timeout:.0f} s; its log is above"
            )
        time.sleep(_POLL_SECONDS)
    return None


def _is_up(url: str) -> bool:
    """Whether the server answers.

    The server is a child process on this machine, so its certificate is not checked: it names another host.
    """
    context = None
    if url.startswith("https"):
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS, context=context) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False  # it listens, but is not ready
    except (OSError, ValueError) as error:  # not listening yet, or not with this scheme
        return _wants_a_certificate(error)


def _wants_a_certificate(error: Exception) -> bool:
    """Whether the TLS server refused us because it wants a client's certificate.

    Then the engine is ready, because engines listen only then.
    """
    cause = getattr(error, "reason", None)
    told = cause if isinstance(cause, ssl.SSLError) else error
    return isinstance(told, ssl.SSLError) and "ALERT" in str(told.reason)


def _wait_end(process: subprocess.Popen[bytes], stop_seconds: float, stopping: Callable[[], bool]) -> int:
    stop_by: float | None = None
    while True:
        try:
            return process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if stopping():
                stop_by = stop_by or time.monotonic() + stop_seconds
                if time.monotonic() > stop_by:
                    raise EngineError(
                        f"the engine did not stop within {stop_seconds:.0f} s and was killed; writes under way are lost"
                    ) from None


@contextmanager
def _guarded(process: subprocess.Popen[bytes], stop_seconds: float) -> Iterator[None]:
    """Make the kernel end the engine's processes when this process is killed."""
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "lmc-guard", str(process.pid), str(int(stop_seconds))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guard.kill()
        guard.wait()
        assert guard.stdin is not None
        guard.stdin.close()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the engine's process group, because an engine that is killed leaves its workers running."""
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
