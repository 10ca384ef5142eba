"""Open the tiers below the host that are configured, for one rank."""

from __future__ import annotations

import logging

from lmc.cache.config import CacheConfig
from lmc.cache.keys import KEY_BYTES, ChunkKey
from lmc.cache.tiers.base import Tier
from lmc.cache.tiers.breaker import Breaker
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.redis import RedisTier
from lmc.errors import ConfigError, TierError

_log = logging.getLogger(__name__)
_NO_KEY = ChunkKey(bytes(KEY_BYTES))


def open_tiers(config: CacheConfig, scope: TierScope) -> tuple[dict[str, Tier], list[str]]:
    """Tiers by name, from the nearest to the farthest, and what is wrong with them in one line each.

    A disk tier that cannot be opened is left out. A remote tier that does not answer stays: its breaker tries again. Raises ConfigError for
    settings that cannot work, and TierError instead of any warning when the configuration is strict.
    """
    tiers: dict[str, Tier] = {}
    warnings: list[str] = []

    def warn(error: TierError, consequence: str) -> None:
        if config.strict:
            raise error
        warnings.append(f"{error}; {consequence}")
        _log.warning("lmc: %s", warnings[-1])

    if config.disk.path is not None:
        try:
            tiers["disk"] = DiskTier(config.disk.path, scope, fsync=config.disk.fsync)
        except TierError as error:
            warn(error, "running without it")
    if config.redis.url is not None:
        tiers["redis"] = Breaker(RedisTier(config.redis, scope))
    if config.s3.bucket is not None:
        tiers["s3"] = Breaker(_open_s3(config, scope))
    for tier in tiers.values():
        try:
            tier.contains([_NO_KEY])
        except TierError as error:
            warn(error, "running without it until it answers")
    return tiers, warnings


def _open_s3(config: CacheConfig, scope: TierScope) -> Tier:
    try:
        from lmc.cache.tiers.s3 import S3Tier
    except ModuleNotFoundError as error:
        raise ConfigError(f"the s3 tier needs the package {error.name}; install lmc[s3]") from error
    return S3Tier(config.s3, scope)
