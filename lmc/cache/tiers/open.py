"""Opens the configured tiers below the host, for one rank."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lmc.cache.config import CacheConfig
from lmc.cache.keys import KEY_BYTES, ChunkKey
from lmc.cache.sections import Compress
from lmc.cache.tiers.breaker import BoundedBreaker, Breaker
from lmc.cache.tiers.codec import codes_for, prepare
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import TierScope, derive_auth_key
from lmc.cache.tiers.late import LateTier, TierHangs, wait_for
from lmc.cache.tiers.mooncake import MooncakeTier
from lmc.cache.tiers.redis import RedisTier
from lmc.errors import ConfigError, TierError

if TYPE_CHECKING:
    from lmc.cache.tiers.s3 import S3Tier

_log = logging.getLogger(__name__)
_SHORTEST_PATIENCE = 5.0  # seconds; a busy machine may keep a call waiting for that long
_CALLS_PER_WAIT = (
    10  # a prompt has many chunks: a call that takes a larger part of what a request waits at most is too slow
)
_SHORTEST_KEY = 16
_NO_KEY = ChunkKey(bytes(KEY_BYTES))


def open_tiers(
    config: CacheConfig, scope: TierScope, num_ranks: int | None = None
) -> tuple[dict[str, Breaker], list[str]]:
    """Tiers by name, from the nearest to the farthest, and what is wrong with them in one line each. num_ranks: that write; None: this
    caller only asks.

    A disk tier that cannot be opened is left out; one that hangs is opened when it answers. A remote tier that does not answer is kept: its
    breaker retries. Raises ConfigError for settings that cannot work, and TierError instead of any warning when the configuration is
    strict.
    """
    tiers: dict[str, Breaker] = {}
    warnings: list[str] = []
    scope = replace(scope, auth_key=read_auth_key(config))
    patience = max(config.load_deadline, _SHORTEST_PATIENCE)  # nobody waits for a chunk any longer
    slow = patience / _CALLS_PER_WAIT

    def warn(error: TierError, consequence: str) -> None:
        if config.strict:
            raise error
        warnings.append(f"{error}; {consequence}")
        _log.warning("lmc: %s", warnings[-1])

    def coded(tier: str, compress: Compress) -> TierScope:
        """The scope for a tier whose setting says so; a caller that only asks needs no codec. Raises TierError."""
        return scope if num_ranks is None else _coded(scope, tier, compress)

    if config.disk.path is not None:
        try:
            capacity = None if num_ranks is None else config.disk.capacity
            own = coded("disk", config.disk.compress)
            open_disk = partial(
                DiskTier, config.disk.path, own, fsync=config.disk.fsync, capacity=capacity, num_ranks=num_ranks or 1
            )
            disk = LateTier("disk", open_disk)
            tiers["disk"] = BoundedBreaker(disk, patience=patience, slow=slow)
            wait_for(partial(disk.contains, [_NO_KEY]), patience, f"disk tier: opening {config.disk.path}")
        except TierHangs as error:
            warn(error, "running without it until it answers; what it holds is found at the next start")
        except TierError as error:
            tiers.pop("disk", None)
            warn(error, "running without it")
    if config.redis.url is not None:
        try:
            redis = RedisTier(config.redis, coded("redis", config.redis.compress))
            tiers["redis"] = Breaker(redis, patience=patience, slow=slow)
        except TierError as error:
            warn(error, "running without it")
    if config.s3.bucket is not None:
        try:
            s3 = _open_s3(config, coded("s3", config.s3.compress))
            tiers["s3"] = Breaker(s3, patience=patience, slow=slow)
        except TierError as error:
            warn(error, "running without it")
    if config.mooncake.master is not None:
        try:
            own = coded("mooncake", config.mooncake.compress)
            mooncake = MooncakeTier(config.mooncake, own, contributes=num_ranks is not None)
            tiers["mooncake"] = Breaker(mooncake, patience=patience, slow=slow)
        except TierError as error:
            warn(error, "running without it")
    for name, tier in tiers.items():
        if name == "disk":
            continue
        try:
            tier.contains([_NO_KEY])
        except TierError as error:
            warn(error, "running without it until it answers")
    return tiers, warnings


def _coded(scope: TierScope, tier: str, compress: Compress) -> TierScope:
    """The scope with the code of the tier's setting, if that can shorten such KV.

    No load compiles anything after this: chunks that were stored with another setting are decoded, too. Raises TierError when the KV or
    this machine cannot be served.
    """
    if compress != "none" and scope.element == "opaque":
        raise TierError(
            f"{tier}.compress is {compress}, but the KV of this engine does not consist of one known kind of number; set it to none"
        )
    if compress != "none" and compress not in codes_for(scope.element):
        _log.warning(
            "lmc: %s.compress: %s has no code for %s; chunks are stored as they are", tier, compress, scope.element
        )
        compress = "none"
    try:
        prepare(compress, scope.element)
    except TierError as error:
        raise TierError(f"{tier}.compress: {error}") from error
    return replace(scope, compress=compress)


def read_auth_key(config: CacheConfig) -> bytes:
    """The key of stored chunks; empty when none is set. Raises ConfigError."""
    text = config.auth_key
    if config.auth_key_file is not None:
        try:
            text = config.auth_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"auth_key_file: cannot read {config.auth_key_file}: {error}") from None
    if text is None:
        return b""
    if len(text) < _SHORTEST_KEY:
        raise ConfigError(f"auth_key: a key of {len(text)} characters can be guessed; use at least {_SHORTEST_KEY}")
    return derive_auth_key(text)


def _open_s3(config: CacheConfig, scope: TierScope) -> S3Tier:
    try:
        from lmc.cache.tiers.s3 import S3Tier
    except ModuleNotFoundError as error:
        raise ConfigError(f"the s3 tier needs the package {error.name}; install lmc-kv[s3]") from error
    return S3Tier(config.s3, scope)
