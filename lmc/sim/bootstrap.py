"""How sure a hit rate is: an interval drawn over sessions, because requests of one session are no independent witnesses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmc.sim.trace import Int32, Int64

_DRAWS = 2000
_AT_ONCE = 50


@dataclass(frozen=True)
class Interval:
    """A share of tokens with its 95 % interval."""

    value: float
    low: float
    high: float


def share_interval(hits: Int64, totals: Int64, sessions: Int32, seed: int = 0) -> Interval:
    """Of sum(hits) / sum(totals), both per request; hits may be a difference of two runs, and negative."""
    _, session = np.unique(sessions, return_inverse=True)
    by_session = np.stack([np.bincount(session, weights=hits), np.bincount(session, weights=totals)], axis=1)
    generator = np.random.default_rng(seed)
    count = by_session.shape[0]
    draws: list[npt.NDArray[np.float64]] = []
    for _ in range(_DRAWS // _AT_ONCE):
        sums = generator.multinomial(count, np.full(count, 1 / count), size=_AT_ONCE) @ by_session
        draws.append(sums[:, 0] / np.maximum(sums[:, 1], 1))
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return Interval(float(hits.sum() / max(totals.sum(), 1)), float(low), float(high))
