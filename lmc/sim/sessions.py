"""Finds the requests that belong together: the sessions of the trace, or conversations that are inferred from growing prompts."""

from __future__ import annotations

import numpy as np

from lmc.compiled import compiled
from lmc.sim.stack import StackProfile
from lmc.sim.trace import Int32, Int64

# A note of what draws intervals over sessions, where sessions_of() had to infer them.
INFERRED = "the trace names no sessions; intervals are drawn over conversations inferred from growing prompts"


def sessions_of(stack: StackProfile) -> tuple[Int32, bool]:
    """(num_requests,) session numbers without gaps, and whether the trace named them.

    If it does not, a prompt that contains a whole earlier prompt counts as its next turn: a request continues the request that last touched
    its deepest known trace block, provided that it holds all full trace blocks of that request, and at least two. A common template can
    join unrelated requests. That makes sessions too long, and intervals that are drawn over sessions too wide rather than too narrow.
    """
    trace = stack.trace
    if (trace.sessions >= 0).all():
        return trace.sessions, True
    full = np.minimum(np.diff(trace.starts), trace.input_tokens // trace.block_tokens)
    return _infer(stack.request, stack.first, stack.length, stack.previous, full), False


@compiled()
def _infer(request: Int32, first: Int32, length: Int32, previous: Int32, full: Int64) -> Int32:
    follows = np.full(full.size, -1, dtype=np.int32)
    for row in range(request.size):  # the last row of a request is its deepest segment
        known = first[row] + length[row]
        follows[request[row]] = previous[row] if known >= max(full[previous[row]], 2) else -1
    sessions = np.empty(full.size, dtype=np.int32)
    count = 0
    for index in range(full.size):
        if follows[index] >= 0:
            sessions[index] = sessions[follows[index]]
        else:
            sessions[index] = count
            count += 1
    return sessions
