"""Random traces of chained blocks, and the plainest simulator of prefix LRU, for tests."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import strategies as st

from lmc.sim.build import TraceBuilder
from lmc.sim.trace import Trace

BLOCK_TOKENS = 4


@st.composite
def traces(draw: st.DrawFn, max_requests: int = 12, max_extension: int = 5) -> Trace:
    """Requests that start anew or fork an earlier one at any depth, some with a partial last block, some empty."""
    chains: list[list[int]] = []
    builder = TraceBuilder("random", "test", BLOCK_TOKENS)
    fresh = 0
    now = 0.0
    for number in range(draw(st.integers(1, max_requests))):
        prefix: list[int] = []
        if chains and draw(st.integers(0, 3)):
            source = chains[draw(st.integers(0, len(chains) - 1))]
            prefix = source[: draw(st.integers(0, len(source)))]
        length = draw(st.integers(1 if number == 0 else 0, max_extension))
        chain = prefix + list(range(fresh, fresh + length))
        fresh += length
        chains.append(chain)
        now += draw(st.sampled_from([0.0, 1.0, 2.5]))
        missing = draw(st.integers(0, BLOCK_TOKENS - 1)) if chain else 0
        hashes, tokens = [7 * block + 3 for block in chain], len(chain) * BLOCK_TOKENS - missing
        builder.add(number + 1, hashes, now, tokens, 1, request_class=draw(st.sampled_from(["", "user", "tool"])))
    return builder.finish()


def chain_of(trace: Trace, request: int) -> list[int]:
    return trace.ids[trace.starts[request] : trace.starts[request + 1]].tolist()


def tokens_of(trace: Trace, request: int, num_blocks: int) -> int:
    return min(num_blocks * trace.block_tokens, int(trace.input_tokens[request]))


def naive_lru(trace: Trace, capacity: int, ttl_s: float = float("inf")) -> list[int]:
    """Hit blocks of each request: look up on the cache as it stands, then touch from the last block to the first."""
    cache: OrderedDict[int, float] = OrderedDict()  # oldest first
    hits = []
    for request in range(trace.num_requests):
        now = float(trace.timestamps_s[request])
        if ttl_s < float("inf"):
            for block in [block for block, touched in cache.items() if now - touched > ttl_s]:
                del cache[block]
        chain = chain_of(trace, request)
        found = 0
        while found < len(chain) and chain[found] in cache:
            found += 1
        hits.append(found)
        for block in reversed(chain):
            cache.pop(block, None)
            cache[block] = now
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits
