"""Open a redis-py client for the topology in the settings: standalone, Cluster or Sentinel, with or without TLS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import ConnectionPool
from redis.retry import Retry
from redis.sentinel import Sentinel

from lmc.cache.config import RedisConfig
from lmc.errors import ConfigError

_DEFAULT_PORT = {"standalone": 6379, "cluster": 6379, "sentinel": 26379}


@dataclass(frozen=True)
class Address:
    hosts: tuple[tuple[str, int], ...]
    socket_path: str | None
    username: str | None
    password: str | None
    db: int
    tls: bool

    def __str__(self) -> str:
        return self.socket_path or ",".join(f"{host}:{port}" for host, port in self.hosts)


def parse_address(url: str, mode: str) -> Address:
    """redis://[user:password@]host[:port][,host[:port]...][/db], rediss:// for TLS, unix:///path. Raises ConfigError."""
    split = urlsplit(url)
    credentials, _, places = split.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    user = (unquote(username) or None, unquote(password) or None)
    if split.scheme == "unix" and mode == "standalone" and split.path:
        return Address((), split.path, *user, 0, False)
    path = split.path.strip("/")
    if split.scheme not in ("redis", "rediss") or not places or split.query or not (path or "0").isdigit():
        shown = url.replace(f"{credentials}@", "", 1)  # a password must not reach the log
        raise ConfigError(
            f"redis.url: {shown!r} is not an address for mode {mode}; write redis://host:port/db, or rediss:// for TLS"
        )
    hosts = []
    for place in places.split(","):
        host, colon, port = place.rpartition(":")
        if not colon:
            host, port = place, str(_DEFAULT_PORT[mode])
        if not host or not port.isdigit():
            raise ConfigError(f"redis.url: {place!r} is not host:port")
        hosts.append((host.strip("[]"), int(port)))
    if mode == "standalone" and len(hosts) > 1:
        raise ConfigError("redis.url: several hosts need mode cluster or sentinel")
    return Address(tuple(hosts), None, *user, int(path or 0), split.scheme == "rediss")


def open_client(config: RedisConfig, address: Address) -> Redis | RedisCluster:
    """A client that never retries and whose every socket operation ends within the time-out. Cluster connects at once, the others later."""
    timing: dict[str, Any] = {  # Any: redis-py takes its options as keywords of many types
        "socket_timeout": config.timeout,
        "socket_connect_timeout": config.timeout,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,  # no push messages between replies
        "max_connections": 1024,
    }
    if address.tls:
        timing |= {"ssl": True, "ssl_ca_certs": str(config.ca_file) if config.ca_file else None}
    options = timing | {
        "username": config.username or address.username,
        "password": config.password or address.password,
    }
    if config.mode == "cluster":
        nodes = [ClusterNode(host, port) for host, port in address.hosts]
        return RedisCluster(startup_nodes=nodes, **options)
    if config.mode == "sentinel":
        sentinel = Sentinel(address.hosts, sentinel_kwargs=timing, db=address.db, **options)
        return sentinel.master_for(config.sentinel_service)
    if address.socket_path is not None:
        return Redis(unix_socket_path=address.socket_path, db=address.db, **options)
    [(host, port)] = address.hosts
    return Redis(host, port, db=address.db, **options)


def node_pool(client: RedisCluster, name: bytes) -> ConnectionPool:
    """Connections to the cluster's node that holds name."""
    return client.get_redis_connection(client.get_node_from_key(name)).connection_pool
