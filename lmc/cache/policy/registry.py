"""The policies by name. Adding one: write the file, add its SPEC here."""

from __future__ import annotations

from lmc.cache.policy import arc, fifo, gdsf, lfu, lirs, lru, predictive, s3fifo, sieve, ttl, twoq
from lmc.cache.policy.base import PolicySpec
from lmc.errors import ConfigError

POLICIES: dict[str, PolicySpec] = {
    spec.name: spec
    for spec in (
        lru.SPEC,
        fifo.SPEC,
        lfu.SPEC,
        sieve.SPEC,
        s3fifo.SPEC,
        arc.SPEC,
        lirs.SPEC,
        twoq.SPEC,
        gdsf.SPEC,
        ttl.SPEC,
        predictive.SPEC,
    )
}


def get_policy(name: str) -> PolicySpec:
    """Raises ConfigError that lists the names when there is no such policy."""
    try:
        return POLICIES[name]
    except KeyError:
        raise ConfigError(f"unknown eviction policy {name!r}; there are {', '.join(sorted(POLICIES))}") from None
