"""What lmc serve does with an engine's process. The engines here are small servers that start, serve and end as real ones do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from lmc.errors import ConfigError, EngineError
from lmc.serve.command import EngineCommand
from lmc.serve.ports import claim_port, for_url, free_port, hold_ports, reachable
from lmc.serve.process import run_engine
from tests.services import LOCAL, make_certificate, wait_until

# Serves /health on a host and port, with TLS if it gets certificate and key, and has a child as engines do.
ENGINE = """
import http.server, os, signal, socket, ssl, subprocess, sys
host, port, *tls = sys.argv[1:]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
server = Server((host, int(port)), Handler)
if tls:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*tls[:2])
    if len(tls) > 2:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(tls[0])
    server.socket = context.wrap_socket(server.socket, server_side=True)
child = subprocess.Popen(["sleep", "300"])
print("child", child.pid, flush=True)
if os.environ.get("STUBBORN"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
server.serve_forever()
"""


def engine(host: str, port: int, *tls: object, stop_seconds: float = 20.0, **environment: str) -> EngineCommand:
    arguments = [sys.executable, "-c", ENGINE, host, str(port), *map(str, tls)]
    return EngineCommand(tuple(arguments), environment, stop_seconds=stop_seconds)


def run_until_ready(command: EngineCommand, address: str) -> tuple[str, int]:
    """What on_ready was told, and the exit code after a SIGTERM to this process."""
    told: list[str] = []

    def ready(url: str) -> None:
        told.append(url)
        os.kill(os.getpid(), signal.SIGTERM)

    code = run_engine(command, address, 60, ready)
    return told[0], code


@pytest.mark.parametrize("host", [LOCAL, "0.0.0.0", "::1", "::", "localhost"])
def test_the_engine_is_found_at_any_address(host: str) -> None:
    port = free_port(host)
    url, code = run_until_ready(engine(host if host != "localhost" else LOCAL, port), f"{reachable(host)}:{port}")
    assert (url, code) == (f"http://{reachable(host)}:{port}", 0)
    assert for_url("::1") == "[::1]" and for_url(LOCAL) == LOCAL


@pytest.mark.parametrize("mutual", [False, True])
def test_an_engine_with_tls_is_found(tmp_path: Path, mutual: bool) -> None:
    made = make_certificate(tmp_path)
    port = free_port(LOCAL)
    command = engine(LOCAL, port, made.certificate, made.private_key, *(["mutual"] if mutual else []))
    assert run_until_ready(command, f"{LOCAL}:{port}") == (f"https://{LOCAL}:{port}", 0)


@pytest.mark.parametrize(
    ("code", "expected"), [("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_engines_exit_code_is_lmcs(code: str, expected: int) -> None:
    command = EngineCommand((sys.executable, "-c", code))
    assert run_engine(command, f"{LOCAL}:{free_port(LOCAL)}", 60, lambda url: None) == expected


def test_an_engine_that_ends_by_itself_is_never_a_success() -> None:
    with pytest.raises(EngineError, match="ended by itself"):
        run_engine(EngineCommand((sys.executable, "-c", "")), f"{LOCAL}:1", 60, lambda url: None)


def test_a_stop_that_became_a_kill_is_said() -> None:
    port = free_port(LOCAL)
    with pytest.raises(EngineError, match="did not stop within 1 s"):
        run_until_ready(engine(LOCAL, port, stop_seconds=1, STUBBORN="1"), f"{LOCAL}:{port}")


def test_an_engine_without_an_api_is_not_waited_for() -> None:
    """The engine asks for the stop until it comes, since the first signals may be sent before run_engine listens."""
    code = f"import os, time\nwhile True: os.kill({os.getpid()}, {int(signal.SIGTERM)}); time.sleep(0.2)"
    command = EngineCommand((sys.executable, "-c", code), health_path=None)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert run_engine(command, "nowhere:1", 0.1, lambda url: None) == 0
    finally:
        signal.signal(signal.SIGTERM, before)


SERVE = """
import sys
from lmc.serve.command import EngineCommand
from lmc.serve.process import run_engine
run_engine(EngineCommand(tuple(sys.argv[2:]), stop_seconds=2), sys.argv[1], 60, lambda url: print("ready", flush=True))
"""


@pytest.mark.parametrize("environment", [{}, {"STUBBORN": "1"}])
def test_kill_9_of_lmc_serve_leaves_nothing(environment: dict[str, str]) -> None:
    port = free_port(LOCAL)
    command = [sys.executable, "-c", SERVE, f"{LOCAL}:{port}", *engine(LOCAL, port).arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}) as serve:
        assert serve.stdout is not None
        child = int(serve.stdout.readline().split()[1])
        assert serve.stdout.readline() == "ready\n"
        started = [psutil.Process(child), *psutil.Process(serve.pid).children(recursive=True)]
        assert len(started) >= 3  # the engine, its child, and the guard
        serve.kill()
    wait_until(lambda: not any(_runs(process) for process in started), "the end of all processes")


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_guard_goes_with_a_clean_end() -> None:
    before = {process.pid for process in psutil.Process().children()}
    run_engine(EngineCommand((sys.executable, "-c", "import sys; sys.exit(3)")), f"{LOCAL}:1", 60, lambda url: None)
    assert {process.pid for process in psutil.Process().children()} <= before


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        act()
    return str(caught.value)


def test_two_that_are_given_one_port_do_not_both_get_it() -> None:
    with ExitStack() as one, ExitStack() as other:
        port = hold_ports(LOCAL, 0, 1, "metrics", one)
        message = refusal(lambda: hold_ports(LOCAL, port, 1, "metrics", other))
        assert f"{LOCAL}:{port}" in message and "another lmc serve" in message
        claim_port(LOCAL, port + 1, "the engine", one)
        assert "another lmc serve" in refusal(lambda: hold_ports(LOCAL, port + 1, 1, "metrics", other))
        one.close()
        assert hold_ports(LOCAL, port, 1, "metrics", other) == port


def test_several_engines_get_ports_in_a_row() -> None:
    with ExitStack() as stack:
        first = hold_ports(LOCAL, 0, 4, "metrics", stack)
        for port in range(first, first + 4):
            with ExitStack() as other:
                assert "another lmc serve" in refusal(
                    lambda port=port, other=other: hold_ports(LOCAL, port, 1, "metrics", other)  # type: ignore[misc]
                )
    assert "no port 65536" in refusal(lambda: hold_ports(LOCAL, 65535, 2, "metrics", ExitStack()))


def test_a_host_that_is_none_is_refused() -> None:
    assert "no.such.host.invalid" in refusal(
        lambda: hold_ports("no.such.host.invalid", 1234, 1, "metrics", ExitStack())
    )
