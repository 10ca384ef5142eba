"""Computes the hits of a policy by its name: by the stack for plain LRU, by an oracle for Belady, by a compiled replay otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmc.cache.policy import get_policy
from lmc.errors import ConfigError
from lmc.sim.belady import belady_hits
from lmc.sim.policy_replay import PLAIN, PolicyHits, ReplayOptions, replay_policy
from lmc.sim.projections import hit_squares
from lmc.sim.stack import HitCurve, StackProfile
from lmc.sim.trace import Trace, Window

BOUND = "belady"


def check_policies(names: Sequence[str]) -> None:
    """Raises ConfigError, which lists the names, for the first unknown one."""
    for name in names:
        if name != BOUND:
            get_policy(name, others=[BOUND])


class Hits(NamedTuple):
    blocks: int
    tokens: int
    squares: int  # sum over requests of the squared hit tokens, which measures the attention work that they save


def hits_at(
    stack: StackProfile,
    policy: str,
    capacities: Sequence[float],
    window: Window,
    curve: HitCurve,
    options: ReplayOptions = PLAIN,
) -> list[Hits]:
    """Hits of the window at each capacity in trace blocks. `curve` is that of plain LRU."""
    trace = stack.trace
    if policy == "lru" and options == PLAIN:
        squares = hit_squares(stack, window)
        return [Hits(*curve.at(size), int(squares[int(min(size, trace.num_unique))])) for size in capacities]
    first = trace.first_request(window)
    found = []
    for result in replay_named(trace, policy, capacities, options):
        tokens = np.minimum(result.request_hits[first:] * np.int64(trace.block_tokens), trace.input_tokens[first:])
        found.append(Hits(result.hit_blocks(trace, window), int(tokens.sum()), int((tokens**2).sum())))
    return found


def replay_named(
    trace: Trace, policy: str, capacities: Sequence[float], options: ReplayOptions = PLAIN
) -> list[PolicyHits]:
    """One result per capacity. A capacity above the number of unique trace blocks, such as infinity, never evicts."""
    sizes = [int(min(capacity, trace.num_unique)) for capacity in capacities]
    if policy != BOUND:
        return replay_policy(trace, get_policy(policy), sizes, options)
    if options != PLAIN:
        raise ConfigError(
            "belady is the bound of a plain cache; remove it, or the options for admission, watermark, delay and TTL"
        )
    return belady_hits(trace, sizes)
