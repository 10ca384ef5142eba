"""Addresses and ports on this machine: what is free, and keeping it until the engine listens there."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

from lmc.errors import ConfigError

_TRIES = 100
_MOST_PORT = 65_535


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with _bound(host, 0) as probe:
        return int(probe.getsockname()[1])


def for_url(host: str) -> str:
    """The host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def reachable(host: str) -> str:
    """Where a server that listens on host is reached from this machine, as it stands in a URL."""
    return for_url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host))


def hold_port(host: str, port: int, what: str) -> socket.socket:
    """A socket on the port (0: a free one) that keeps others off it until closed; servers, which set SO_REUSEADDR, can listen there.

    Raises ConfigError when the port cannot be had.
    """
    try:
        return _bound(host, port)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {for_url(host)}:{port} for {what}: {reason}; choose another port"
        ) from None


def hold_ports(host: str, port: int, count: int, what: str, stack: ExitStack) -> int:
    """Hold `count` ports from this one on (0: free ones) until the stack is closed, against other programs and other lmc serve; the first.

    Two that hold the same port would not notice each other before one of them listens, so each also claims it.
    """
    if port:
        for number in range(port, port + count):
            _claim_and_hold(host, number, what, stack)
        return port
    for _ in range(_TRIES):
        if count == 1:
            with hold_port(host, 0, what) as probe:
                first = int(probe.getsockname()[1])
        else:
            first = random.randrange(20_000, 60_000)
        with ExitStack() as attempt:
            try:
                for number in range(first, first + count):
                    _claim_and_hold(host, number, what, attempt)
            except ConfigError:
                continue
            stack.push(attempt.pop_all())
            return first
    raise ConfigError(f"no {count} free ports in a row on {for_url(host)} for {what}; choose a port")


def claim_port(host: str, port: int, what: str, stack: ExitStack) -> None:
    """Keep other lmc serve off the port until the stack is closed. Raises ConfigError when one has it."""
    name = stack.enter_context(socket.socket(socket.AF_UNIX))
    try:
        name.bind(f"\0lmc serve, port {port}")  # no file, and gone with this process
    except OSError:
        raise ConfigError(
            f"cannot listen on {for_url(host)}:{port} for {what}: another lmc serve has it; choose another port"
        ) from None


def _claim_and_hold(host: str, port: int, what: str, stack: ExitStack) -> None:
    if port > _MOST_PORT:
        raise ConfigError(f"there is no port {port} for {what}; choose a lower one")
    claim_port(host, port, what, stack)
    stack.enter_context(hold_port(host, port, what))


def _bound(host: str, port: int) -> socket.socket:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    held = socket.socket(family, kind)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        held.bind(address)
    except OSError:
        held.close()
        raise
    return held
