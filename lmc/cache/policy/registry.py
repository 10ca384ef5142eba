"""The policies by name. To add one, write its file and add its SPEC here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import isinf
from typing import Any

from lmc.cache.policy import arc, fifo, gdsf, lfu, lirs, lru, outside, predictive, s3fifo, sieve, twoq
from lmc.cache.policy.base import Parents, PolicySpec
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

    NAME@4 is a policy of lmc that remembers four evicted chunks for each place, NAME@inf one that remembers all; the latter is for replays
    of policies only.
    Raises ConfigError, which lists the names; `others` are further names that the caller accepts.
    """
    if name == "ttl":
        raise ConfigError(
            "'ttl' is no longer an eviction policy; use fifo, which evicts in the same order, and the setting ttl to drop chunks by age"
        )
    base, at, share = name.partition("@")
    if at and base in POLICIES:
        return _with_ghosts(base, share)
    if name in POLICIES:
        return POLICIES[name]
    if outside.is_file(name):
        return _with_own_name(outside.load_file(outside.absolute(name)))
    if name in outside.installed():
        return _with_own_name(outside.load_installed(name))
    known = ", ".join([*sorted(POLICIES), *sorted(outside.installed()), *others])
    raise ConfigError(f"unknown eviction policy {name!r}; there are {known}, or FILE.py:SPEC for a policy of your own")


def live_policy(name: str) -> str:
    """The name under which the live cache finds this policy from every folder. Raises ConfigError if it has none that it can run."""
    if isinf(get_policy(name).ghosts):
        raise ConfigError(f"policy {name} remembers chunks without a limit; write {name.partition('@')[0]}@4")
    return outside.absolute(name)


def _with_own_name(spec: PolicySpec) -> PolicySpec:
    if spec.name in POLICIES:
        raise ConfigError(f"a policy from outside is called {spec.name!r}, as one of lmc's; give it another name")
    return spec


@cache
def _with_ghosts(name: str, share: str) -> PolicySpec:
    """The policy with so many remembered nodes for each resident one; inf remembers all. Raises ConfigError."""
    spec = POLICIES[name]
    try:
        ghosts = float(share)
    except ValueError:
        ghosts = -1.0
    if not ghosts > 0:
        raise ConfigError(
            f"policy {name}@{share}: {share!r} is no number of remembered chunks for each place; write {name}@4 or {name}@inf"
        )

    if spec.set_ghosts is None:
        able = ", ".join(sorted(known for known, one in POLICIES.items() if one.set_ghosts is not None))
        raise ConfigError(f"policy {name}@{share}: what {name} remembers cannot be changed; that of {able} can")

    def make_state(num_nodes: int, capacity: int, parents: Parents) -> Any:  # Any: each policy has its own state
        state = spec.make_state(num_nodes, capacity, parents)
        assert spec.set_ghosts is not None
        spec.set_ghosts(state, num_nodes if isinf(ghosts) else max(1, int(capacity * ghosts)))
        return state

    return replace(spec, name=f"{name}@{share}", make_state=make_state, ghosts=ghosts)
