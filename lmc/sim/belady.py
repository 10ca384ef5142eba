"""The upper bound of any eviction policy: Belady's rule (1966) for chains of trace blocks of one size.

The rule evicts the trace block whose next use is farthest away, and among equals the deepest; those of the running request can be evicted
too. So a trace block need not be stored at all, and admission policies cannot beat the rule either. A parent is used no later than its
child, so children are evicted first, the resident set is closed under prefixes, and hits of trace blocks are prefix hits.

Trace blocks wait in *buckets*: each request has one, for those whose next use it is. These all lie on the request's chain, and the deeper
ones were touched earlier, so a bucket is a queue. A trace block that is never used again is not kept. The time is O(trace blocks + segments
* log requests).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lmc.compiled import compiled
from lmc.errors import ConfigError
from lmc.sim.policy_replay import PolicyHits
from lmc.sim.trace import Int32, Int64, Trace


def belady_hits(trace: Trace, capacities: Iterable[int], *, workers: int | None = None) -> list[PolicyHits]:
    """One result for each capacity (in trace blocks), in their order. The results name the policy "belady" and hold no victims."""
    wanted = [int(capacity) for capacity in capacities]
    if any(capacity < 1 for capacity in wanted):
        raise ConfigError(f"a capacity must be at least one trace block, not {min(wanted)}")
    next_use = _next_use(trace.ids, trace.starts, trace.num_unique)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        runs = [pool.submit(_belady_hits, trace.ids, trace.starts, trace.num_unique, next_use, size) for size in wanted]
        results = [run.result() for run in runs]
    return [
        PolicyHits("belady", capacity, hits, evictions, resident, np.empty(0, dtype=np.int32))
        for capacity, (hits, evictions, resident) in zip(wanted, results, strict=True)
    ]


@compiled()
def _next_use(ids: Int32, starts: Int64, num_unique: int) -> Int32:
    """(num_blocks,) the next request that uses the same trace block, or the number of requests if none does."""
    num_requests = starts.size - 1
    coming = np.full(num_unique, num_requests, dtype=np.int32)
    next_use = np.empty(ids.size, dtype=np.int32)
    for request in range(num_requests - 1, -1, -1):
        for index in range(starts[request], starts[request + 1]):
            next_use[index] = coming[ids[index]]
            coming[ids[index]] = request
    return next_use


@compiled()
def _belady_hits(ids: Int32, starts: Int64, num_unique: int, next_use: Int32, capacity: int) -> tuple[Int32, int, int]:
    num_requests = starts.size - 1
    hits = np.zeros(num_requests, dtype=np.int32)
    there = np.zeros(num_unique, dtype=np.uint8)
    behind = np.zeros(num_unique, dtype=np.int32)  # the next one in its bucket
    first = np.full(num_requests, -1, dtype=np.int32)  # by bucket
    last = np.full(num_requests, -1, dtype=np.int32)
    heap = np.empty(
        num_requests, dtype=np.int32
    )  # of buckets, the farthest on top; a bucket of a past request stays at the bottom
    num_heap = 0
    count = 0
    evictions = 0

    for request in range(num_requests):
        start, end = starts[request], starts[request + 1]
        found = start
        while found < end and there[ids[found]]:
            found += 1
        hits[request] = found - start
        count -= found - start  # these were the bucket of this request; each now waits for its next use

        for index in range(end - 1, start - 1, -1):
            node = ids[index]
            bucket = next_use[index]
            if bucket == num_requests:
                there[node] = 0
                continue
            there[node] = 1
            count += 1
            if first[bucket] >= 0:
                behind[last[bucket]] = node
            else:
                first[bucket] = node
                place = num_heap
                num_heap += 1
                while place > 0 and heap[(place - 1) // 2] < bucket:
                    heap[place] = heap[(place - 1) // 2]
                    place = (place - 1) // 2
                heap[place] = bucket
            last[bucket] = node
            behind[node] = -1

        while count > capacity:
            bucket = heap[0]
            node = first[bucket]
            there[node] = 0
            count -= 1
            evictions += 1
            first[bucket] = behind[node]
            if behind[node] >= 0:
                continue
            num_heap -= 1
            moved = heap[num_heap]
            place = 0
            while 2 * place + 1 < num_heap:
                below = 2 * place + 1
                if below + 1 < num_heap and heap[below + 1] > heap[below]:
                    below += 1
                if heap[below] <= moved:
                    break
                heap[place] = heap[below]
                place = below
            heap[place] = moved
    return hits, evictions, count
