"""Open a redis-py client for the topology in the settings: standalone, Cluster or Sentinel, with or without TLS."""

from __future__ import annotations

from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import ConnectionPool
from redis.retry import Retry
from redis.sentinel import Sentinel

from lmc.cache.sections import RedisConfig
from lmc.cache.tiers.redis_address import Address


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
        ca_file = str(config.ca_file) if config.ca_file else None
        timing |= {"ssl": True, "ssl_ca_certs": ca_file, "ssl_cert_reqs": "required", "ssl_check_hostname": True}
    options = timing | {
        "username": config.username or address.username,
        "password": config.password or address.password,
    }
    if config.mode == "cluster":
        nodes = [ClusterNode(host, port) for host, port in address.hosts]
        return RedisCluster(startup_nodes=nodes, **options)
    if config.mode == "sentinel":
        own = timing | {"username": config.sentinel_username, "password": config.sentinel_password}
        sentinel = Sentinel(address.hosts, sentinel_kwargs=own, db=address.db, **options)
        return sentinel.master_for(config.sentinel_service)
    if address.socket_path is not None:
        return Redis(unix_socket_path=address.socket_path, db=address.db, **options)
    [(host, port)] = address.hosts
    return Redis(host, port, db=address.db, **options)


def node_pool(client: RedisCluster, name: bytes) -> ConnectionPool:
    """Connections to the cluster's node that holds name."""
    return client.get_redis_connection(client.get_node_from_key(name)).connection_pool
