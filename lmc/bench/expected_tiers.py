"""Which tier an arm's hits must come from, where none forgets: the engine's own memory first, then host memory, then what is below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmc.bench.counters import Counters
from lmc.bench.engine_counters import pool
from lmc.bench.expected import expected_hits
from lmc.bench.prompts import Request
from lmc.bench.schedule import Plan
from lmc.bench.workload import Arm
from lmc.cache.config import CacheConfig, chunk_tokens_for


def expected_by_tier(
    arm: Arm, plan: Plan, counters: Counters | None, seen: Sequence[Request], before: Sequence[Request]
) -> dict[str, int] | None:
    """Hit tokens by tier to the token, or None where they cannot be told so: requests at the same time, several instances, a tier that is
    too small for the load, or two tiers below the host. Arguments as of arm_expectation()."""
    if arm.reuse != "cache" or counters is None or not plan.is_ordered or arm.instances > 1:
        return None
    space = pool(counters)
    if space is None or not space.is_exact:
        return None
    requests = [item.request for item in plan.items]
    settings = CacheConfig.model_validate(arm.cache or {})
    chunk_tokens = chunk_tokens_for(settings, space.block_tokens)
    configured = {
        "disk": settings.disk.path is not None,
        "redis": settings.redis.url is not None,
        "s3": settings.s3.bucket is not None,
    }
    below = [tier for tier, there in configured.items() if there]
    own = [0] * len(requests)
    if counters.label("vllm:cache_config_info", "enable_prefix_caching") != "False":
        own = expected_hits(requests, space.block_tokens, space.num_blocks, before)
        if own != expected_hits(requests, space.block_tokens, np.inf, before):
            return None
    slots = counters.by_label("lmc_slots", "tier")
    host = expected_hits(requests, chunk_tokens, slots.get("host", 0.0), before)
    everything = expected_hits(requests, chunk_tokens, slots.get("disk", np.inf), [*seen, *before])
    unbounded = [expected_hits(requests, chunk_tokens, np.inf, sent) for sent in (before, [*seen, *before])]
    if len(below) > 1 or [host, everything] != unbounded:
        return None
    tiers = {"device": sum(own), "host": sum(max(h - d, 0) for h, d in zip(host, own, strict=True))}
    if below:
        tiers[below[0]] = sum(max(e - max(h, d), 0) for e, h, d in zip(everything, host, own, strict=True))
    return tiers
