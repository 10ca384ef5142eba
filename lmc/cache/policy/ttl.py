"""TTL: evict the chunk whose time to live ends first. With one fixed lifetime for all chunks that is the one stored first.

The policy reads no clock: which chunks are past their lifetime, and that they are dropped without pressure, is the host's affair. (With a
sliding lifetime the first to expire is the one touched longest ago: that order is lru.)
"""

from __future__ import annotations

from lmc.cache.policy import fifo
from lmc.cache.policy.base import PolicySpec

SPEC = PolicySpec(
    "ttl",
    "first to expire under one fixed lifetime, which hits do not renew",
    fifo.make_state,
    fifo.on_hit,
    fifo.on_insert,
    fifo.victim,
    fifo.on_evict,
    fifo.release,
)
