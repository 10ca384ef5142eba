"""Read a Redis address. Its password may hold any character, and nothing of the address is ever put into a message."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote

from lmc.errors import ConfigError

_DEFAULT_PORT = {"standalone": 6379, "cluster": 6379, "sentinel": 26379}
_PLACE = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/?#@]+)(?::(?P<port>[0-9]{1,5}))?")
_NUMBER = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True)
class Address:
    hosts: tuple[tuple[str, int], ...]
    socket_path: str | None
    username: str | None
    password: str | None = field(repr=False)
    db: int
    tls: bool

    def __str__(self) -> str:
        return self.socket_path or ",".join(f"{host}:{port}" for host, port in self.hosts)


def parse_address(url: str, mode: str) -> Address:
    """redis://[user:password@]host[:port][,host[:port]...][/db], rediss:// for TLS, unix://[user:password@]/path[?db=N].

    What comes before the last @ is user and password, as they are or with %XX for any character. Raises ConfigError.
    """
    scheme, colon, rest = url.partition("://")
    if not colon or scheme not in ("redis", "rediss", "unix"):
        raise _wrong("it does not begin with redis://, rediss:// or unix://", mode)
    if scheme == "unix":
        return _socket(rest, mode)
    credentials, _, places = rest.rpartition("@")
    places, _, query = places.partition("?")
    places, _, path = places.partition("/")
    hosts = []
    for number, place in enumerate(places.split(","), start=1):
        match = _PLACE.fullmatch(place)
        port = int(match["port"] or _DEFAULT_PORT[mode]) if match is not None else 0
        if match is None or not 0 < port < 65536:
            raise _wrong(f"its host number {number} is not host:port", mode)
        hosts.append((match["host"].strip("[]"), port))
    if mode == "standalone" and len(hosts) > 1:
        raise ConfigError("redis.url: several hosts need mode cluster or sentinel")
    return Address(
        tuple(hosts), None, *_credentials(credentials), _database(path.strip("/"), query, mode), scheme == "rediss"
    )


def _socket(rest: str, mode: str) -> Address:
    if mode != "standalone":
        raise _wrong("a unix:// address has one server", mode)
    credentials, path = "", rest
    if not rest.startswith("/"):
        credentials, at, path = rest.rpartition("@/")
        path = "/" + path if at else ""
    path, _, query = path.partition("?")
    if len(path) < 2:
        raise _wrong("it has no path", mode)
    return Address((), path, *_credentials(credentials), _database("", query, mode), False)


def _credentials(text: str) -> tuple[str | None, str | None]:
    username, _, password = text.partition(":")
    return unquote(username) or None, unquote(password) or None


def _database(path: str, query: str, mode: str) -> int:
    """The number at the end of the path, or as ?db=N."""
    name, _, number = query.partition("=")
    if query and name != "db":
        raise _wrong("it may end with ?db=N and with no other option", mode)
    text = number if query else path or "0"
    if not _NUMBER.fullmatch(text) or (query and path):
        raise _wrong("its database is not a number", mode)
    return int(text)


def _wrong(reason: str, mode: str) -> ConfigError:
    return ConfigError(
        f"redis.url is not an address for mode {mode}: {reason}; write redis://user:password@host:port/db, or rediss:// for TLS"
    )
