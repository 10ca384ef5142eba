"""Say what can never work in the settings of the tiers, before anything is opened or asked."""

from __future__ import annotations

from lmc.cache.config import CacheConfig
from lmc.cache.sections import LEAST_CAPACITY
from lmc.cache.tiers.mooncake import check_master
from lmc.cache.tiers.redis_address import parse_address
from lmc.errors import ConfigError
from lmc.units import format_seconds, format_size

_LONGEST = {"lookup_deadline": 60.0, "node_deadline": 60.0, "load_deadline": 600.0, "close_timeout": 3600.0}  # seconds


def check_meant(config: CacheConfig) -> None:
    """Refuse values that the schema allows and nobody means: deadlines of 0 or of hours, sizes that hold no chunk. Raises ConfigError."""
    for key, longest in _LONGEST.items():
        seconds: float = getattr(config, key)
        if seconds > longest:
            raise ConfigError(
                f"{key} is {format_seconds(seconds)}, at most {format_seconds(longest)} can be meant; write a unit, as in 50ms"
            )
        if seconds == 0 and key != "close_timeout":
            raise ConfigError(f"{key} is 0, so nothing that takes time is ever waited for; write a time, as in 50ms")
    for key, ttl in (("ttl", config.ttl), ("redis.ttl", config.redis.ttl)):
        if ttl == 0:
            raise ConfigError(f"{key} is 0, which drops every chunk at once; leave it out, or write a time, as in 1h")
    sizes = {"host.capacity": config.host.capacity, "disk.capacity": config.disk.capacity}
    for key, size in sizes.items():
        if isinstance(size, int) and size < LEAST_CAPACITY:
            raise ConfigError(f"{key} is {format_size(size)}, which holds no chunk; write more, as in 8GiB")
    endpoint = config.s3.endpoint
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"s3.endpoint {endpoint!r} is no address; it begins with http:// or https://")
    if config.redis.url is not None:
        parse_address(config.redis.url, config.redis.mode)
    if config.mooncake.master is not None:
        check_master(config.mooncake.master)


def check_tiers(config: CacheConfig) -> None:
    """Raises ConfigError."""
    check_meant(config)
    redis = config.redis
    if redis.url is not None and redis.ca_file is not None and not redis.ca_file.is_file():
        raise ConfigError(f"redis.ca_file: there is no file {redis.ca_file}")
    if config.s3.bucket is not None:
        try:
            from lmc.cache.tiers.s3 import open_store
        except ModuleNotFoundError as error:
            raise ConfigError(f"the s3 tier needs the package {error.name}; install lmc-kv[s3]") from error
        open_store(config.s3)
