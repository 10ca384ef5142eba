"""The S3 tier: one object per chunk, payload and footer, in any S3-compatible store, under PREFIX/v4/<namespace>/r<rank>/<key>.

obstore signs and sends the requests, and repeats one that failed in passing (a 5xx, a dropped connection) within the time-out. Objects are
written by a single request, so they appear whole. The store's own rules decide how long they stay.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from lmc.cache.keys import ChunkKey
from lmc.cache.sections import S3Config
from lmc.cache.tiers.aws import aws_settings
from lmc.cache.tiers.format import FOOTER_BYTES, FORMAT, Hasher, TierScope, stored_bytes
from lmc.cache.tiers.stored import Moved, pack, unpack
from lmc.errors import ConfigError, Corrupt, TierError

_RETRIES = 2
_PIECE = 1 << 20  # bytes copied into the slot and hashed while they are in the CPU's cache
_HEADS_AT_ONCE = 32


class S3Tier:
    """Raises ConfigError for settings that obstore refuses, and TierError for what goes wrong later."""

    name = "s3"

    def __init__(self, config: S3Config, scope: TierScope) -> None:
        if config.bucket is None:
            raise ConfigError("s3.bucket is not set")
        self._scope = scope
        self._timeout = config.timeout
        self._folder = f"{FORMAT}/{scope.namespace}/r{scope.rank}"
        self._store = open_store(config)
        self._where = f"s3 tier in {_settings(config).get('endpoint', 'AWS')}, bucket {config.bucket}"

    def put(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> Moved:
        self._scope.check_size(data)
        payload, coding, seconds = pack(self._scope, data)
        footer = self._scope.seal(key, self._scope.checksum(payload), parent, len(payload), coding)
        with self._named_errors("store", key):
            try:
                obstore.put(self._store, self._name(key), [payload, footer], use_multipart=False)
            except FileNotFoundError as error:
                raise OSError(_first_line(error)) from error
        return Moved(stored_bytes(len(payload)), seconds)

    def get(self, key: ChunkKey, out: memoryview) -> Moved:
        with self._named_errors("load", key):
            try:
                answer = obstore.get(self._store, self._name(key))
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise OSError("there is no such bucket") from error
                raise KeyError(key) from None
            size = answer.meta["size"]
            if not FOOTER_BYTES < size <= stored_bytes(len(out)):
                raise Corrupt(f"the object has {size} bytes instead of {stored_bytes(len(out))}")
            value = memoryview(answer.bytes())
            payload, footer = value[:-FOOTER_BYTES], value[-FOOTER_BYTES:]
            raw = len(payload) == len(out)
            digest = _copy(payload, out, self._scope.hasher()) if raw else self._scope.checksum(payload)
            return unpack(self._scope, key, payload, footer, digest, out)

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Send one HEAD request per key, many at once. All of them together end within the time-out."""
        if not keys:
            return []
        with self._named_errors("look up", keys[0]):
            return asyncio.run(self._heads([self._name(key) for key in keys]))

    def delete(self, key: ChunkKey) -> None:
        with self._named_errors("delete", key):
            try:
                obstore.delete(self._store, self._name(key))
            except FileNotFoundError:
                pass

    def close(self) -> None:
        """Do nothing: obstore closes its connections by itself."""

    def _name(self, key: ChunkKey) -> str:
        return f"{self._folder}/{key.hex()}"

    async def _heads(self, names: Sequence[str]) -> list[bool]:
        limit = asyncio.Semaphore(_HEADS_AT_ONCE)

        async def head(name: str) -> bool:
            async with limit:
                try:
                    await obstore.head_async(self._store, name)
                except FileNotFoundError:
                    return False
                return True

        async with asyncio.timeout(self._timeout):
            return await asyncio.gather(*map(head, names))

    @contextmanager
    def _named_errors(self, action: str, key: ChunkKey) -> Iterator[None]:
        where = f"{self._where}: cannot {action} {key.hex()}"
        try:
            yield
        except Corrupt as error:
            raise type(error)(f"{where}: {error}") from None
        except TimeoutError as error:
            raise TierError(f"{where}: no answer within {self._timeout:g} s") from error
        except (BaseError, OSError) as error:
            raise TierError(f"{where}: {_first_line(error)}") from error


def open_store(config: S3Config) -> S3Store:
    """Connects to nothing yet. Raises ConfigError."""
    settings = _settings(config)
    endpoint = settings.get("endpoint", "")
    if endpoint:
        split = urlsplit(endpoint)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise ConfigError("s3.endpoint must be an address that starts with http:// or https://")
        if "@" in split.netloc:
            raise ConfigError("s3.endpoint must not hold a password; set s3.access_key_id and s3.secret_access_key")
    timeout = timedelta(seconds=config.timeout)
    try:
        return S3Store(
            config.bucket,
            prefix=config.prefix,
            config=settings,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "timeout": timeout,
                "connect_timeout": timeout,
            },
            retry_config={
                "max_retries": _RETRIES,
                "retry_timeout": timeout,
                "backoff": {"init_backoff": timeout / 50, "max_backoff": timeout / 5, "base": 2},
            },
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(f"s3: {_first_line(error)}") from error


def _settings(config: S3Config) -> dict[str, str]:
    """lmc's settings before AWS's own; keys are taken from one place, never mixed."""
    found = aws_settings(os.environ, Path.home())
    if config.access_key_id is not None or config.secret_access_key is not None:
        found.pop("session_token", None)
    given = {
        "endpoint": config.endpoint,
        "region": config.region,
        "access_key_id": config.access_key_id,
        "secret_access_key": config.secret_access_key,
    }
    found |= {name: value for name, value in given.items() if value is not None}
    if found.get("endpoint"):
        found.setdefault("region", "us-east-1")  # a store of one's own seldom cares
    return found


def _copy(source: memoryview, out: memoryview, hasher: Hasher) -> int:
    """Copy and return what hasher says of the copy."""
    for start in range(0, len(out), _PIECE):
        piece = out[start : start + _PIECE]
        piece[:] = source[start : start + _PIECE]
        hasher.update(piece)
    return hasher.intdigest()


def _first_line(error: Exception) -> str:
    """First line of an error's text: obstore appends pages of debug output."""
    return str(error).split("\n", 1)[0]
