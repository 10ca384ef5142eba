"""The hits that the simulator expects of an arm: of each request, and by tier, on the very prompts that are sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmc.bench.counters import Counters
from lmc.bench.engine_counters import pool
from lmc.bench.prompts import Request
from lmc.bench.schedule import Plan
from lmc.bench.workload import Arm
from lmc.cache.config import CacheConfig, chunk_tokens_for
from lmc.cache.keys import ChunkKey, KeyChain
from lmc.sim.build import TraceBuilder
from lmc.sim.stack import profile, request_hits
from lmc.sim.trace import Trace

_ROOT = ChunkKey(bytes(32))


def to_trace(requests: Sequence[Request], chunk_tokens: int) -> Trace:
    """The requests as a trace of full chunks, in the given order."""
    builder = TraceBuilder("workload", "bench", chunk_tokens)
    for index, request in enumerate(requests):
        keys = KeyChain(_ROOT, chunk_tokens).extend(request.prompt.tolist())
        hashes = builder.name_to_int(key.hex() for key in keys)
        builder.add(index + 1, hashes, float(index), len(request.prompt), request.output_tokens)
    return builder.finish()


def expected_hits(
    requests: Sequence[Request], chunk_tokens: int, capacity_chunks: float = np.inf, seen: Sequence[Request] = ()
) -> list[int]:
    """Hit tokens of each request in an LRU cache to which `seen` was sent before. The last token of a prompt is always computed."""
    everything = [*seen, *requests]
    if all(len(request.prompt) < chunk_tokens for request in everything):
        return [0] * len(requests)
    hits = request_hits(profile(to_trace(everything, chunk_tokens)), capacity_chunks)[len(seen) :]
    limits = [(len(request.prompt) - 1) // chunk_tokens for request in requests]
    return [min(int(hit), limit) * chunk_tokens for hit, limit in zip(hits, limits, strict=True)]


def expected_by_request(
    arm: Arm, plan: Plan, counters: Counters | None, seen: Sequence[Request], before: Sequence[Request]
) -> tuple[list[int] | None, bool]:
    """Expected hit tokens of each planned request, and whether the measured ones must equal them to the token.

    `before` was sent to the arm's own engine ahead of the load; `seen` was sent to the arm whose disk this one reuses. The result is None
    where the hits cannot be computed.
    """
    requests = [item.request for item in plan.items]
    if arm.reuse == "unknown" or counters is None:
        return None, False
    if arm.reuse == "none":
        return [0] * len(requests), True
    space = pool(counters)
    block_tokens = space.block_tokens if space is not None else 0
    if arm.reuse == "engine":
        if space is None:
            return None, False
        blocks = space.num_blocks
        if not space.is_exact:  # then hits are known only where nothing is forgotten, even beside the longest request
            blocks -= max(-(-(len(r.prompt) + r.output_tokens) // block_tokens) for r in requests)
        hits = expected_hits(requests, block_tokens, max(blocks, 0), before)
        fits = hits == expected_hits(requests, block_tokens, np.inf, before)
        return (hits, plan.is_ordered and fits) if fits or space.is_exact else (None, False)
    settings = CacheConfig.model_validate(arm.cache or {})
    chunk_tokens = chunk_tokens_for(settings, block_tokens or 1)
    remote = any((settings.redis.url, settings.s3.bucket, settings.mooncake.master))
    capacity = np.inf if remote else max(counters.by_label("lmc_slots", "tier").values(), default=np.inf)
    hits = expected_hits(requests, chunk_tokens, capacity, [*seen, *before])
    fits = hits == expected_hits(requests, chunk_tokens, np.inf, [*seen, *before])
    # Another instance sees a stored chunk only once it is written.
    return hits, plan.is_ordered and fits and arm.instances == 1


def expected_by_tier(
    arm: Arm, plan: Plan, counters: Counters | None, seen: Sequence[Request], before: Sequence[Request]
) -> dict[str, int] | None:
    """Expected hit tokens by tier: the engine's own memory serves first, then host memory, then the tier below it.

    The arguments are those of expected_by_request(). The result is None where the split is not certain to the token: requests overlap, the
    arm has several instances or two tiers below the host, or a tier is too small for the load.
    """
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
        "mooncake": settings.mooncake.master is not None,
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
