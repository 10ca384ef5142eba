from __future__ import annotations

import errno
import socket
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lmc.errors import ConfigError
from lmc.serve.ports import hold_port
from tests.services import LOCAL, free_port


def test_a_held_port_is_a_servers_and_nobody_elses() -> None:
    with hold_port(LOCAL, 0, "metrics") as held:
        port = held.getsockname()[1]
        with closing(socket.socket()) as other:
            with pytest.raises(OSError) as caught:
                other.bind((LOCAL, port))
            assert caught.value.errno == errno.EADDRINUSE
        with ThreadingHTTPServer((LOCAL, port), BaseHTTPRequestHandler):  # what the metrics endpoint is
            with socket.create_connection((LOCAL, port), timeout=5):
                pass
            with pytest.raises(
                ConfigError, match=f"cannot listen on {LOCAL}:{port} for metrics: .*; choose another port"
            ):
                hold_port(LOCAL, port, "metrics")


def test_a_port_is_free_again_afterwards() -> None:
    port = free_port()
    hold_port(LOCAL, port, "the engine").close()
    with closing(socket.socket()) as other:
        other.bind((LOCAL, port))
