"""Predicts which backend copies a batch fastest, from a few measurements at start and interpolation between them.

The crossover between the copy engine and a kernel differs by device, direction and number of copies by an order of magnitude, so nothing
is hard-coded. A rate is the cost of one piece at some sizes plus the cost of a call; a batch costs the sum over its pieces.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lmc.cache.transfer.planner import Descriptors, Direction

PIECE_SIZES = (
    32 << 10,
    4 << 10,
    256 << 10,
    8 << 10,
    128 << 10,
    16 << 10,
    64 << 10,
)  # coarse first: the budget may end early
SCRATCH_BYTES = 8 << 20
BUDGET_S = 0.1
REPETITIONS = 3

Measure = Callable[[str, Direction, int, int], float]  # (backend, direction, piece bytes, pieces) -> seconds


@dataclass(frozen=True)
class Rate:
    call_s: float
    sizes: tuple[int, ...]  # bytes, rising
    piece_s: tuple[float, ...]  # seconds of one piece of that size among many

    def seconds(self, descriptors: Descriptors) -> float:
        size = descriptors.size.astype(np.float64)
        inside = np.interp(size, self.sizes, self.piece_s)
        beyond = np.maximum(size / self.sizes[-1], 1.0)  # larger pieces run at the rate of the largest measured
        return self.call_s + float((inside * beyond).sum())


@dataclass(frozen=True)
class CostModel:
    rates: Mapping[tuple[str, Direction], Rate]
    seconds: float  # that the calibration took

    def fastest(self, names: Iterable[str], descriptors: Descriptors) -> str:
        """The name with the lowest cost. An unmeasured backend is chosen only if none was measured."""
        known = [name for name in names if (name, descriptors.direction) in self.rates]
        return min(known, key=lambda name: self.rates[name, descriptors.direction].seconds(descriptors))

    def describe(self) -> str:
        """One line for the log: GB/s of each backend by direction and piece size."""
        parts = []
        for (name, direction), rate in self.rates.items():
            figures = ", ".join(
                f"{size >> 10} KiB {size / cost / 1e9:.1f}" for size, cost in zip(rate.sizes, rate.piece_s, strict=True)
            )
            parts.append(f"{direction} by {name}: {figures} GB/s")
        return "; ".join(parts)


def calibrate(
    names: Iterable[str],
    measure: Measure,
    *,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> CostModel:
    """Measure every backend in both directions at as many sizes as the time budget allows, and at least at one.

    measure must have warmed up the backend, because compiling a kernel is not part of its rate.
    """
    names = list(names)
    started = clock()
    pieces: dict[tuple[str, Direction], dict[int, float]] = {(n, d): {} for n in names for d in Direction}
    calls: dict[tuple[str, Direction], float] = {}
    for size in PIECE_SIZES:
        for name, direction in pieces:
            if pieces[name, direction] and clock() - started > budget_s:
                continue
            if (name, direction) not in calls:
                calls[name, direction] = _median(measure, name, direction, size, 1)
            count = SCRATCH_BYTES // size
            whole = _median(measure, name, direction, size, count)
            pieces[name, direction][size] = max((whole - calls[name, direction]) / (count - 1), 1e-12)
    rates = {}
    for key, costs in pieces.items():
        sizes = tuple(sorted(costs))
        first = costs[PIECE_SIZES[0]]
        rates[key] = Rate(max(calls[key] - first, 0.0), sizes, tuple(costs[size] for size in sizes))
    return CostModel(rates, clock() - started)


def _median(measure: Measure, name: str, direction: Direction, size: int, count: int) -> float:
    return statistics.median(measure(name, direction, size, count) for _ in range(REPETITIONS))
