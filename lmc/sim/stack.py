"""Computes the exact prefix-LRU hits for all capacities in one pass over a trace.

A lookup sees the cache as it is when the request arrives; then the request touches its trace blocks from the last to the first. So a
parent is always younger than its child, the resident set is closed under prefixes, and a prefix hit is a plain LRU stack hit: a cache
holds a trace block if its capacity is at least the block's *rank*, its place in the stack (1 is the youngest). Of a request longer than the
cache only the first trace blocks are kept. (Mattson et al. 1970 for stacks; the LiteHit notes of alibaba/tair-kvcache for frozen lookups
and tail-to-head touches.)

The trace blocks that one request touched last form one contiguous *segment* of the stack, in chain order. So the pass keeps a Fenwick tree
over requests instead of trace blocks, and writes one row per segment that a new request walks through. Everything else is computed from
those rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmc.compiled import compiled
from lmc.sim.trace import Float64, Int32, Int64, Trace, Window

Marks = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class StackProfile:
    """All hits of a trace: trace blocks first..first+length-1 of a request had ranks above+1..above+length."""

    trace: Trace
    request: Int32  # (num_segments,) never decreasing
    first: Int32  # position in the request's chain
    length: Int32
    above: Int32  # trace blocks that are younger than the segment
    previous: Int32  # the request that touched the segment last

    @property
    def age_s(self) -> Float64:
        """(num_segments,) seconds since the segment was touched."""
        return self.trace.timestamps_s[self.request] - self.trace.timestamps_s[self.previous]


@dataclass(frozen=True, eq=False)
class HitCurve:
    """Hits of the measured requests at every capacity from 0 to the number of unique trace blocks."""

    hit_blocks: Int64  # (num_unique + 1,)
    hit_tokens: Int64  # (num_unique + 1,)
    total_blocks: int
    total_tokens: int

    def at(self, capacity: float) -> tuple[int, int]:
        """(hit trace blocks, hit tokens) at a capacity in trace blocks, which may be infinity."""
        index = int(min(capacity, self.hit_blocks.size - 1))
        return int(self.hit_blocks[index]), int(self.hit_tokens[index])


def profile(trace: Trace) -> StackProfile:
    """The pass. It takes time O(trace blocks + segments * log live requests) and 4 bytes per unique trace block, 20 per segment."""
    return StackProfile(trace, *_walk(trace.ids, trace.starts, trace.num_unique))


def hit_curve(stack: StackProfile, window: Window = "all", rows: Marks | None = None) -> HitCurve:
    """Hits of the window's requests at every capacity. `rows`, if given, marks the segments that can count as hits."""
    trace = stack.trace
    start = trace.first_request(window)
    begin = int(np.searchsorted(stack.request, start))
    chosen = slice(begin, None) if rows is None else begin + np.flatnonzero(rows[begin:])
    blocks, tokens = _curves(
        stack.request[chosen],
        stack.first[chosen],
        stack.length[chosen],
        stack.above[chosen],
        trace.input_tokens,
        trace.block_tokens,
        trace.num_unique,
    )
    return HitCurve(blocks, tokens, int(trace.starts[-1] - trace.starts[start]), int(trace.input_tokens[start:].sum()))


def request_hits(stack: StackProfile, capacity: float, max_age_s: float = np.inf) -> Int64:
    """(num_requests,) trace blocks that hit at one capacity, counting only those touched within max_age_s (a sliding TTL).

    The TTL is exact: expired trace blocks are the oldest ones, so they lie below all others in the stack.
    """
    hits = np.clip(int(min(capacity, stack.trace.num_unique)) - stack.above.astype(np.int64), 0, stack.length)
    if max_age_s < np.inf:
        hits[stack.age_s > max_age_s] = 0
    return np.bincount(stack.request, weights=hits, minlength=stack.trace.num_requests).astype(np.int64)


@compiled()
def _walk(ids: Int32, starts: Int64, num_unique: int) -> tuple[Int32, Int32, Int32, Int32, Int32]:
    """(request, first, length, above, previous) of all segments.

    Requests take *slots* in order of time. A slot counts the trace blocks that its request was the last to touch, and a Fenwick tree sums
    the counts. When all slots are taken, those of live requests are moved together.
    """
    num_requests = starts.size - 1
    size = 4096
    while 8 * size < num_unique:
        size *= 2
    last = np.full(num_unique, -1, dtype=np.int32)  # slot of the request that touched the trace block last
    slots = np.zeros((size, 2), dtype=np.int32)  # trace blocks, request; side by side, so that one read gets both
    tree = np.zeros(size + 1, dtype=np.int32)
    used = 0
    resident = 0

    rows = 0
    room = 1024 + num_requests
    request_of = np.empty(room, dtype=np.int32)
    first_of = np.empty(room, dtype=np.int32)
    length_of = np.empty(room, dtype=np.int32)
    above_of = np.empty(room, dtype=np.int32)
    previous_of = np.empty(room, dtype=np.int32)

    for request in range(num_requests):
        begin, end = starts[request], starts[request + 1]
        if begin == end:
            continue
        if used == size:
            used = _close_up(slots, last)
            while 2 * used > size:
                size *= 2
            slots, tree = _grow_slots(slots, size), _sum_up(slots[:used, 0], size)

        index = begin
        while index < end and last[ids[index]] >= 0:
            slot = last[ids[index]]
            run = index
            while run < end and last[ids[run]] == slot:
                last[ids[run]] = used
                run += 1
            length = run - index
            if rows == room:
                room *= 2
                request_of, first_of, length_of = _grow(request_of, room), _grow(first_of, room), _grow(length_of, room)
                above_of, previous_of = _grow(above_of, room), _grow(previous_of, room)
            younger = resident
            node = slot + 1
            while node > 0:
                younger -= tree[node]
                node &= node - 1
            request_of[rows] = request
            first_of[rows] = index - begin
            length_of[rows] = length
            above_of[rows] = younger
            previous_of[rows] = slots[slot, 1]
            rows += 1
            slots[slot, 0] -= length
            node = slot + 1
            while node <= size:
                tree[node] -= length
                node += node & -node
            index = run
        for fresh in range(index, end):
            last[ids[fresh]] = used
        resident += end - index

        slots[used, 0] = end - begin
        slots[used, 1] = request
        node = used + 1
        while node <= size:
            tree[node] += end - begin
            node += node & -node
        used += 1
    return request_of[:rows], first_of[:rows], length_of[:rows], above_of[:rows], previous_of[:rows]


@compiled()
def _close_up(slots: Int32, last: Int32) -> int:
    """Move the live slots together, in order, and update `last`. Returns the number of live slots."""
    moved = np.empty(slots.shape[0], dtype=np.int32)
    live = 0
    for slot in range(slots.shape[0]):
        moved[slot] = live
        if slots[slot, 0] > 0:
            slots[live] = slots[slot]
            live += 1
    for block in range(last.size):
        if last[block] >= 0:
            last[block] = moved[last[block]]
    return live


@compiled()
def _grow_slots(slots: Int32, size: int) -> Int32:
    if size == slots.shape[0]:
        return slots
    grown = np.empty((size, 2), dtype=np.int32)
    grown[: slots.shape[0]] = slots
    return grown


@compiled()
def _sum_up(counts: Int32, size: int) -> Int32:
    """A Fenwick tree of `size` nodes over the counts."""
    tree = np.zeros(size + 1, dtype=np.int32)
    tree[1 : counts.size + 1] = counts
    for node in range(1, size + 1):
        above = node + (node & -node)
        if above <= size:
            tree[above] += tree[node]
    return tree


@compiled()
def _grow(old: Int32, room: int) -> Int32:
    grown = np.empty(room, dtype=np.int32)
    grown[: old.size] = old
    return grown


@compiled()
def _curves(
    request: Int32,
    first: Int32,
    length: Int32,
    above: Int32,
    input_tokens: Int64,
    block_tokens: int,
    num_unique: int,
) -> tuple[Int64, Int64]:
    """Sum up second differences: a segment adds one hit at each of its ranks, so it makes two entries."""
    blocks = np.zeros(num_unique + 2, dtype=np.int64)
    missing = np.zeros(num_unique + 2, dtype=np.int64)  # by rank, the tokens that partial last trace blocks lack
    for row in range(request.size):
        owner = request[row]
        low = above[row] + 1
        high = above[row] + length[row]
        blocks[low] += 1
        blocks[high + 1] -= 1
        begin = first[row]
        end = begin + length[row]
        full = input_tokens[owner] // block_tokens
        for position in range(max(begin, full), end):  # only the partial last one, in a correct trace
            has = min(max(input_tokens[owner] - position * block_tokens, 0), block_tokens)
            missing[low + position - begin] += block_tokens - has
    tokens = np.empty(num_unique + 1, dtype=np.int64)
    at_rank = 0
    hits = 0
    lacking = 0
    for rank in range(num_unique + 1):
        at_rank += blocks[rank]
        hits += at_rank
        lacking += missing[rank]
        blocks[rank] = hits
        tokens[rank] = hits * block_tokens - lacking
    return blocks[: num_unique + 1], tokens
