"""Say what can never work in the settings of the tiers, before anything is opened or asked."""

from __future__ import annotations

from lmc.cache.config import CacheConfig
from lmc.cache.tiers.mooncake import check_master
from lmc.cache.tiers.redis_address import parse_address
from lmc.errors import ConfigError


def check_tiers(config: CacheConfig) -> None:
    """Raises ConfigError."""
    redis = config.redis
    if redis.url is not None:
        parse_address(redis.url, redis.mode)
        if redis.ca_file is not None and not redis.ca_file.is_file():
            raise ConfigError(f"redis.ca_file: there is no file {redis.ca_file}")
    if config.mooncake.master is not None:
        check_master(config.mooncake.master)
    if config.s3.bucket is not None:
        try:
            from lmc.cache.tiers.s3 import open_store
        except ModuleNotFoundError as error:
            raise ConfigError(f"the s3 tier needs the package {error.name}; install lmc-kv[s3]") from error
        open_store(config.s3)
