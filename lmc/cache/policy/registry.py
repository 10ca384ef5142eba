"""The policies by name. To add one, write its file and add its SPEC here."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.policy import arc, fifo, gdsf, lfu, lirs, lru, outside, predictive, s3fifo, sieve, twoq
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
    """Return the policy of that name: one of lmc's, of an installed package, or of a file (FILE.py:SPEC).

    Raises ConfigError, which lists the names; `others` are further names that the caller accepts.
    """
    if name == "ttl":
        raise ConfigError(
            "'ttl' is no longer an eviction policy; use fifo, which evicts in the same order, and the setting ttl to drop chunks by age"
        )
    if name in POLICIES:
        return POLICIES[name]
    if outside.is_file(name):
        return _with_own_name(outside.load_file(outside.absolute(name)))
    if name in outside.installed():
        return _with_own_name(outside.load_installed(name))
    known = ", ".join([*sorted(POLICIES), *sorted(outside.installed()), *others])
    raise ConfigError(f"unknown eviction policy {name!r}; there are {known}, or FILE.py:SPEC for a policy of your own")


def _with_own_name(spec: PolicySpec) -> PolicySpec:
    if spec.name in POLICIES:
        raise ConfigError(f"a policy from outside is called {spec.name!r}, as one of lmc's; give it another name")
    return spec
