"""Starts a node: its socket, its memory, its metrics page; says when it is ready, and stops in order when it is told to."""

from __future__ import annotations

import errno
import fcntl
import grp
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

from lmc.cache.config import CacheConfig
from lmc.cache.node.memory import Memory, whole_pages
from lmc.cache.node.page import open_page
from lmc.cache.node.server import Node
from lmc.cache.tiers.check import check_tiers
from lmc.cache.tiers.room import usable_disk
from lmc.errors import ConfigError
from lmc.memory import available_memory
from lmc.units import format_size

logger = logging.getLogger(__name__)

DEFAULT_SOCKET = Path("/run/lmc.sock")
_LONGEST_PATH = 107  # of a Unix socket


def serve_node(config: CacheConfig, path: Path, say: Callable[[str], None]) -> None:
    """Run until SIGTERM or SIGINT. Raises ConfigError, in one line, before anybody could attach."""
    check_tiers(config)
    config = usable_disk(config)
    group = _group(config.node_group)
    with ExitStack() as stack:
        listener = stack.enter_context(_listening(path, group))
        size = memory_bytes(config)
        node = Node(config, listener, Memory(size), group=group)
        stack.callback(node.close, config.close_timeout)
        page = open_page(config, node)
        if page is not None:
            stack.callback(page.close)
            node.metrics_url = page.url

        def end(number: int, frame: FrameType | None) -> None:
            node.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        say(f"ready socket={path} memory={format_size(size)} metrics={node.metrics_url or 'off'}")
        _notify("READY=1")
        node.run()
        _notify("STOPPING=1")
        logger.info("lmc: node: stopping")


def memory_bytes(config: CacheConfig) -> int:
    """host.capacity in bytes. Raises ConfigError if there is not so much."""
    capacity, memory = config.host.capacity, available_memory()
    if isinstance(capacity, str):
        return whole_pages(int(memory.free * float(capacity.rstrip("%")) / 100))
    if capacity > memory.free:
        raise ConfigError(
            f"host.capacity {format_size(capacity)} is more than the {format_size(memory.free)} that are free, as {memory.by} "
            "says; lower it, or wait until engines have let go of a node's memory of before"
        )
    return capacity


@contextmanager
def _listening(path: Path, group: int | None) -> Iterator[socket.socket]:
    """A socket at path that only this user, and the group if there is one, may connect to. Raises ConfigError."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(f"--socket {path}: a socket's path has at most {_LONGEST_PATH} bytes; choose a shorter one")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _lock(path, stack)
            _remove_stale(path)
            listener = stack.enter_context(closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
            before = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(before)
            stack.callback(_unlink, path, path.stat().st_ino)
            if group is not None:
                os.chown(path, -1, group)
                path.chmod(0o660)
            listener.listen(256)
        except OSError as error:
            raise ConfigError(f"--socket {path}: {_why(error)}") from None
        yield listener


def _lock(path: Path, stack: ExitStack) -> None:
    """Two nodes on one socket would take it from each other. The lock ends with the process, however that ends."""
    lock = path.with_name(path.name + ".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"--socket {path}: another node serves it; stop that one, or choose another socket") from None


def _remove_stale(path: Path) -> None:
    """The socket of a node that was killed. Nobody holds its lock."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"--socket {path}: this is no socket; remove it, or choose another path")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigError(f"--socket {path}: another program listens there; choose another socket")


def _unlink(path: Path, number: int) -> None:
    """Unless another node has put its own there meanwhile."""
    with suppress(OSError):
        if path.stat().st_ino == number:
            path.unlink()


def _group(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"node_group: there is no group {name!r}") from None


def _notify(state: str) -> None:
    """Tell systemd, if it has started this process and wants to know."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)) as sender:
        try:
            sender.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
        except OSError as error:
            logger.warning("lmc: node: cannot tell %s that %s: %s", address, state, error.strerror)


def _why(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return "this user may not create it; choose another path, or give the folder to this user"
    return error.strerror or str(error)
