"""Finds free ports on this machine and keeps them until the engine listens there."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

from lmc.errors import ConfigError

_TRIES = 100
_MOST_PORT = 65_535


def free_port(host: str) -> int:
    """Return a port on which no process listens at this moment."""
    with _bound(host, 0) as probe:
        return int(probe.getsockname()[1])


def for_url(host: str) -> str:
    """Return the host in the form that a URL needs: an IPv6 address gets brackets."""
    return f"[{host}]" if ":" in host else host


def reachable(host: str) -> str:
    """Return the host, in a URL's form, under which this machine reaches a server that listens on `host`."""
    return for_url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host))


def hold_port(host: str, port: int, what: str) -> socket.socket:
    """Return a bound socket that keeps other programs off the port until it is closed. Port 0 takes a free one.

    A server that sets SO_REUSEADDR, as engines do, can listen on the port all the same.

    Raises ConfigError when the port is in use or not permitted.
    """
    try:
        return _bound(host, port)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {for_url(host)}:{port} for {what}: {reason}; choose another port"
        ) from None


def hold_ports(host: str, port: int, count: int, what: str, stack: ExitStack) -> int:
    """Hold `count` consecutive ports from this one on until the stack is closed, and return the first. Port 0 takes free ones.

    Two processes that hold one port notice each other only when one of them listens, so each `lmc serve` claims its ports as well.
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
    """Keep other `lmc serve` processes off the port until the stack is closed. Raises ConfigError when one of them holds it."""
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
