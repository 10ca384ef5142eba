"""The Redis (or Valkey) tier: one value per chunk, payload and footer, under lmc:v4:<namespace>:<rank>:<key>.

redis-py connects, authenticates, encrypts and follows the topology, and does the small commands; values go over its sockets directly
(redis_wire.py). Nothing is connected before the first call, so an unreachable server costs a TierError per call and not the start.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from redis import Redis, RedisError
from redis.cluster import RedisCluster
from redis.connection import AbstractConnection, ConnectionPool
from redis.exceptions import RedisClusterException

from lmc.cache.keys import ChunkKey
from lmc.cache.sections import RedisConfig
from lmc.cache.tiers.codec import room_for
from lmc.cache.tiers.format import FOOTER_BYTES, FORMAT, TierScope, stored_bytes
from lmc.cache.tiers.redis_address import parse_address
from lmc.cache.tiers.redis_connect import node_pool, open_client
from lmc.cache.tiers.redis_wire import ErrorReply, Wire
from lmc.cache.tiers.stored import Moved, pack, unpack
from lmc.errors import ConfigError, Corrupt, TierError, TierFull

_FAILURES = (RedisError, RedisClusterException, OSError)
_MOVED = ("MOVED", "ASK", "TRYAGAIN")

T = TypeVar("T")


class RedisTier:
    """Raises ConfigError for an address that cannot be right, and TierError for what goes wrong later."""

    name = "redis"

    def __init__(self, config: RedisConfig, scope: TierScope) -> None:
        if config.url is None:
            raise ConfigError("redis.url is not set")
        self._config = config
        self._scope = scope
        self._address = parse_address(config.url, config.mode)
        self._prefix = f"lmc:{FORMAT}:{scope.namespace}:{scope.rank}:".encode()
        self._ttl_ms = None if config.ttl is None else max(1, round(config.ttl * 1000))
        self._client: Redis | RedisCluster | None = None
        self._idle: dict[ConnectionPool, list[_Line]] = {}
        self._opening = threading.Lock()

    def put(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> Moved:
        name = self._name(key)
        self._scope.check_size(data)
        expiry = [] if self._ttl_ms is None else [b"PX", b"%d" % self._ttl_ms]
        payload, coding, seconds = pack(self._scope, data)

        def footer(payload_checksum: int) -> bytes:
            return self._scope.seal(key, payload_checksum, parent, len(payload), coding)

        def store(wire: Wire) -> None:
            wire.set(name, payload, footer, self._scope.hasher(), expiry)
            wire.line()

        with self._named_errors("store", key) as client:
            try:
                self._talk(client, name, store)
            except ErrorReply as reply:
                if not str(reply).startswith(_MOVED):
                    raise
                client.set(name, bytes(payload) + footer(self._scope.checksum(payload)), px=self._ttl_ms)
        return Moved(stored_bytes(len(payload)), seconds)

    def get(self, key: ChunkKey, out: memoryview) -> Moved:
        name = self._name(key)
        footer = memoryview(bytearray(FOOTER_BYTES))

        def load(wire: Wire) -> Moved | None:
            wire.command(b"GET", name)
            found = wire.bulk(out, footer, self._scope.hasher(), room_for)
            if found is None:
                return None
            payload, digest = found  # verified here: a connection that brings garbage is not used again
            return unpack(self._scope, key, payload, footer, digest, out)

        with self._named_errors("load", key) as client:
            try:
                moved = self._talk(client, name, load)
            except ErrorReply as reply:
                if not str(reply).startswith(_MOVED):
                    raise
                moved = self._get_moved(client, key, out)
            if moved is None:
                raise KeyError(key)
            return moved

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        if not keys:
            return []
        with self._named_errors("look up", keys[0]) as client:
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.exists(self._name(key))
            return [bool(answer) for answer in pipeline.execute()]

    def delete(self, key: ChunkKey) -> None:
        with self._named_errors("delete", key) as client:
            client.unlink(self._name(key))

    def close(self) -> None:
        client = self._forget_client()
        if client is not None:
            client.close()

    def _name(self, key: ChunkKey) -> bytes:
        return self._prefix + key.hex().encode()

    def _forget_client(self) -> Redis | RedisCluster | None:
        client, self._client, self._idle = self._client, None, {}
        return client

    def _connected(self) -> Redis | RedisCluster:
        client = self._client
        if client is not None:
            return client
        if not self._opening.acquire(timeout=self._config.timeout):
            raise TimeoutError("another thread is still connecting")
        try:
            if self._client is None:
                self._client = open_client(self._config, self._address)
            return self._client
        finally:
            self._opening.release()

    def _talk(self, client: Redis | RedisCluster, name: bytes, talk: Callable[[Wire], T]) -> T:
        """Call talk() with a connection to name's server. It is closed if it may be out of step, else kept for the next call.

        Taking a connection from the pool and returning it costs 0.09 ms, a tenth of a load, so connections stay taken.
        """
        pool = client.connection_pool if self._config.mode != "cluster" else node_pool(client, name)
        idle = self._idle.setdefault(pool, [])
        line = _pop_usable(idle) or _Line(pool, self._config.timeout)
        in_step = False
        try:
            answer = talk(line.wire)
            in_step = True
        finally:
            if in_step:
                idle.append(line)
            else:
                line.discard()
        return answer

    def _get_moved(self, client: Redis | RedisCluster, key: ChunkKey, out: memoryview) -> Moved | None:
        """GET while the cluster moves the key's slot: redis-py follows the redirections, at the price of copies."""
        value = client.get(self._name(key))
        if value is None:
            return None
        if not FOOTER_BYTES < len(value) <= stored_bytes(len(out)):
            raise Corrupt(f"the value has {len(value)} bytes instead of {stored_bytes(len(out))}")
        payload, footer = memoryview(value)[:-FOOTER_BYTES], memoryview(value)[-FOOTER_BYTES:]
        if len(payload) == len(out):
            out[:] = payload
        digest = self._scope.checksum(payload)
        return unpack(self._scope, key, payload, footer, digest, out)

    @contextmanager
    def _named_errors(self, action: str, key: ChunkKey) -> Iterator[Redis | RedisCluster]:
        client = None
        try:
            client = self._connected()
            yield client
        except Corrupt as error:
            raise type(error)(self._message(action, key, error)) from None
        except ErrorReply as reply:
            raise _kind_of(reply)(self._message(action, key, reply)) from None
        except _FAILURES as error:
            if self._config.mode == "cluster" and self._client is client:
                self._forget_client()  # the next call learns the topology anew
            raise TierError(self._message(action, key, error)) from error

    def _message(self, action: str, key: ChunkKey, error: Exception) -> str:
        return f"redis tier at {self._address}: cannot {action} {key.hex()}: {error}"


def _kind_of(reply: ErrorReply) -> type[TierError]:
    if str(reply).startswith("OOM"):
        return TierFull
    if str(reply).startswith("WRONGTYPE"):
        return Corrupt  # somebody's list or hash stands under the chunk's name; a delete or a put ends that
    return TierError


class _Line:
    """A connection taken from its pool, with objects that are made once for it: making one anew takes a hundredth of a load."""

    def __init__(self, pool: ConnectionPool, seconds: float) -> None:
        self._pool = pool
        self._connection: AbstractConnection = pool.get_connection()
        self.wire = Wire(self._connection._sock, seconds)
        self._poll = select.poll()
        self._poll.register(self._connection._sock, select.POLLIN)

    @property
    def usable(self) -> bool:
        """Whether it can be used: not if the server has closed it, or if it belongs to the process that this one was forked from."""
        return self._connection.pid == os.getpid() and not self._poll.poll(0)

    def discard(self) -> None:
        self._connection.disconnect()
        self._pool.release(self._connection)


def _pop_usable(idle: list[_Line]) -> _Line | None:
    while idle:
        try:
            line = idle.pop()
        except IndexError:
            break  # another thread took the last one
        if line.usable:
            return line
        line.discard()
    return None
