"""How large tiers must be for a hit rate: the smallest LRU capacity that reaches it, with its interval, and ways to place it in tiers.

Hits are tokens of the last half of the requests, with the cache warmed by the first, and without a prompt's last token, which a live cache
never loads. With write: through the largest tier decides, so the capacity may lie in host memory alone, or on a disk or in a remote tier
below less host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmc.errors import ConfigError
from lmc.sim.bootstrap import LEVEL, draw_sessions
from lmc.sim.cost import CostModel
from lmc.sim.sessions import sessions_of
from lmc.sim.stack import StackProfile, profile, request_hits
from lmc.sim.tier_grid import TierPoint, tier_grid
from lmc.sim.trace import Float64, Int64, Trace, Window, require_blocks

WINDOW: Window = "last-half"
BELOW = ("disk", "remote")
_GRID = 96  # capacities at which the interval is computed
_AT_ONCE = 50


@dataclass(frozen=True)
class Sizing:
    """The capacity for one target. Rates are hit tokens / input tokens; sizes are in trace blocks."""

    target: float
    rate: float  # at the capacity
    blocks: int
    low_blocks: int  # the interval of the capacity at the level of lmc.sim.bootstrap
    high_blocks: float  # infinity if no capacity is surely enough
    places: list[TierPoint]  # host alone, then less host with each tier below


class Sizer:
    """Finds capacities in one trace for any number of targets."""

    def __init__(self, trace: Trace) -> None:
        """Raises TraceError for a trace without trace blocks."""
        require_blocks(trace)
        self.stack: StackProfile = profile(trace)
        self.trace = trace
        first = trace.first_request(WINDOW)
        self._inputs = trace.input_tokens[first:]
        self._first = first
        sessions, self.sessions_named = sessions_of(self.stack)
        _, self._session = np.unique(sessions[first:], return_inverse=True)
        self.ceiling = self.rate(np.inf)
        self._grid = np.unique(np.geomspace(1, max(trace.num_unique, 1), _GRID).astype(np.int64))
        by_session = [np.bincount(self._session, weights=self._hits(size)) for size in self._grid]
        self._by_session = np.stack([*by_session, np.bincount(self._session, weights=self._inputs)], axis=1)

    def rate(self, capacity: float) -> float:
        return float(self._hits(capacity).sum() / max(self._inputs.sum(), 1))

    def size(self, target: float, cost: CostModel | None = None, host_blocks: int | None = None) -> Sizing:
        """The sizing for a share of the input tokens. host_blocks: host memory above a disk or a remote tier; by default that with half of
        the hits. Raises ConfigError for a target that no capacity reaches.
        """
        if not 0 < target <= self.ceiling:
            raise ConfigError(
                f"no capacity hits {100 * target:.4g} % of the tokens of {self.trace.source}: an unlimited cache hits "
                f"{100 * self.ceiling:.4g} % in the last half of the requests; give a target above 0 and up to that"
            )
        blocks = self._smallest(target)
        low, high = self._interval(target)
        host = min(host_blocks or self._smallest(self.rate(blocks) / 2), blocks)
        tiers = ["host", *BELOW] if cost is None else [name for name in ("host", *BELOW) if name in cost.tiers]
        places = []
        for name in tiers:
            sizes: dict[str, Sequence[float]] = (
                {"host": [blocks]} if name == "host" else {"host": [host], name: [blocks]}
            )
            places += tier_grid(self.stack, sizes, WINDOW, cost)
        return Sizing(target, self.rate(blocks), blocks, min(low, blocks), max(high, blocks), places)

    def _hits(self, capacity: float) -> Int64:
        """(requests of the window,) hit tokens."""
        return self.trace.loaded_tokens(request_hits(self.stack, capacity))[self._first :]

    def _smallest(self, target: float) -> int:
        """The smallest capacity with this hit rate, which is not above the ceiling; hits never fall with the capacity."""
        low, high = 1, self.trace.num_unique
        while low < high:
            middle = (low + high) // 2
            if self.rate(middle) >= target:
                high = middle
            else:
                low = middle + 1
        return low

    def _interval(self, target: float) -> tuple[int, float]:
        """The capacities that reach the target in all but the rarest resamples of sessions, on the grid; infinity if none does."""
        found: list[Float64] = []
        sizes = np.append(self._grid.astype(np.float64), np.inf)
        for drawn in draw_sessions(self._by_session.shape[0], 0, _AT_ONCE):
            sums = drawn @ self._by_session
            reached = sums[:, :-1] >= target * np.maximum(sums[:, -1:], 1)
            found.append(sizes[np.where(reached.any(axis=1), reached.argmax(axis=1), sizes.size - 1)])
        ordered = np.sort(np.concatenate(found))
        last = ordered.size - 1
        low, high = ordered[int(last * (1 - LEVEL) / 2)], ordered[int(np.ceil(last * (1 + LEVEL) / 2))]
        return int(min(low, self.trace.num_unique)), float(high)
