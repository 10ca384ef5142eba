"""Which engine answers for a policy: the stack engine for plain LRU, an oracle for Belady, a compiled replay for every other one."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.policy import POLICIES, get_policy
from lmc.errors import ConfigError
from lmc.sim import belady, policy_replay
from lmc.sim.policy_replay import PLAIN, PolicyHits, ReplayOptions
from lmc.sim.stack import HitCurve
from lmc.sim.trace import Trace, Window

BOUND = "belady"


def check_policies(names: Sequence[str]) -> None:
    """Raises ConfigError that lists the names."""
    for name in names:
        if name != BOUND and name not in POLICIES:
            raise ConfigError(f"unknown eviction policy {name!r}; there are {', '.join([*sorted(POLICIES), BOUND])}")


def hits_at(
    trace: Trace,
    policy: str,
    capacities: Sequence[float],
    window: Window,
    curve: HitCurve,
    options: ReplayOptions = PLAIN,
) -> list[tuple[int, int]]:
    """Hit blocks and hit tokens of the window at each capacity in blocks; curve is plain LRU's."""
    if policy == "lru" and options == PLAIN:
        return [curve.at(capacity) for capacity in capacities]
    results = replay(trace, policy, capacities, options)
    return [(result.hit_blocks(trace, window), result.hit_tokens(trace, window)) for result in results]


def replay(trace: Trace, policy: str, capacities: Sequence[float], options: ReplayOptions = PLAIN) -> list[PolicyHits]:
    """One run per capacity. A capacity beyond the unique blocks, infinity too, is one that never evicts."""
    sizes = [int(min(capacity, trace.num_unique)) for capacity in capacities]
    if policy != BOUND:
        return policy_replay.replay(trace, get_policy(policy), sizes, options)
    if options != PLAIN:
        raise ConfigError("belady is the bound of a plain cache; leave it out with admission, watermark, delay or TTL")
    return belady.replay(trace, sizes)
