"""Intervals of a figure by drawing whole sessions again and again, because the requests of one session depend on each other.

(Efron & Tibshirani 1993, block bootstrap.) lmc.bench.stats draws in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lmc.sim.trace import Float64, Int32, Int64

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 50


@dataclass(frozen=True)
class Interval:
    """A share of tokens with its interval at LEVEL."""

    value: float
    low: float
    high: float


def draw_sessions(num_sessions: int, seed: int | Sequence[int], at_once: int) -> Iterator[Int64]:
    """RESAMPLES rows in all, at most `at_once` in each array (rows, num_sessions): how often each session was drawn."""
    generator = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - start)
        yield generator.multinomial(num_sessions, np.full(num_sessions, 1 / num_sessions), size=rows)


def bounds(figures: Sequence[Float64]) -> tuple[float, float]:
    """The interval at LEVEL from the figure of every resample."""
    low, high = np.quantile(np.concatenate(figures), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def share_interval(hits: Int64, totals: Int64, sessions: Int32, seed: int = 0) -> Interval:
    """The share sum(hits) / sum(totals). All three are per request; hits may be a difference of two runs, and negative."""
    _, session = np.unique(sessions, return_inverse=True)
    by_session = np.stack([np.bincount(session, weights=hits), np.bincount(session, weights=totals)], axis=1)
    sums = [drawn @ by_session for drawn in draw_sessions(by_session.shape[0], seed, _AT_ONCE)]
    low, high = bounds([drawn[:, 0] / np.maximum(drawn[:, 1], 1) for drawn in sums])
    return Interval(float(hits.sum() / max(totals.sum(), 1)), low, high)
