"""The policies by name. To add one, write its file and add its SPEC here."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.policy import arc, fifo, gdsf, lfu, lirs, lru, predictive, s3fifo, sieve, twoq
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
        predictive.SPEC,
    )
}


def get_policy(name: str, others: Sequence[str] = ()) -> PolicySpec:
    """Return the policy of that name. Raises ConfigError, which lists the names; `others` are further names that the caller accepts."""
    if name == "ttl":
        raise ConfigError(
            "'ttl' is no longer an eviction policy; use fifo, which evicts in the same order, and the setting ttl to drop chunks by age"
        )
    try:
        return POLICIES[name]
    except KeyError:
        known = ", ".join([*sorted(POLICIES), *others])
        raise ConfigError(f"unknown eviction policy {name!r}; there are {known}") from None
