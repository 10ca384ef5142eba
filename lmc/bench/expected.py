"""The hits that a cache of a given size would give: predicted by the simulator on the very prompts that are sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmc.bench.prompts import Request
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
    """Hit tokens of each request under LRU, after `seen` was sent before. The last token of a prompt is always computed."""
    everything = [*seen, *requests]
    if all(len(request.prompt) < chunk_tokens for request in everything):
        return [0] * len(requests)
    hits = request_hits(profile(to_trace(everything, chunk_tokens)), capacity_chunks)[len(seen) :]
    limits = [(len(request.prompt) - 1) // chunk_tokens for request in requests]
    return [min(int(hit), limit) * chunk_tokens for hit, limit in zip(hits, limits, strict=True)]
