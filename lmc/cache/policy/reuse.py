"""What the predictive policy learns: how likely a chunk of a class, not touched since some age, is touched again soon.

Ages are counted in requests and fall into *bins*, two an octave. For each class and bin the tables hold how many touches lived to that age
and how many ended there in another touch (a life table, Kaplan and Meier 1958); old counts fade. A class of which little is known leans on
all classes together, and a bin of which nothing is known on the bin before. The *value* of a chunk is the hits it is expected to bring
within the horizon, the time in which the cache turns over, or twice that, per request (compare LHD, Beckmann et al., NSDI 2018).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

NUM_BINS = 40  # up to a million requests
FIRST_GUESS = 0.1  # share of chunks touched again in a bin, before anything is known
GUESS_FADES = 0.8  # from bin to bin
KEEP = 0.997  # of old counts, each time a class is appraised
LEAN = 4.0  # requests' worth of chunks that the guess counts as
HORIZON = 1.0  # turnovers of the cache
FARTHEST = 2.0  # horizons: the look ahead doubles up to here, where that promises more hits per request
NOISE = 0.03  # values below this share of what a place earns on average are equal; older chunks go first then


class Life(NamedTuple):
    lower: Int64  # (NUM_BINS + 1,) the least age of a bin
    reached: Float64  # (num_classes + 1, NUM_BINS) touches that lived to the bin; the last row is all classes together
    reused: Float64  # (num_classes + 1, NUM_BINS) touches that ended in the bin with another touch
    value: Float64  # (num_classes * NUM_BINS,)


def make_life(num_classes: int) -> Life:
    lower = np.array([k if k < 4 else int(2 ** (k / 2)) for k in range(NUM_BINS)] + [1 << 62], dtype=np.int64)
    tables = np.zeros((num_classes + 1, NUM_BINS), dtype=np.float64)
    return Life(lower, tables, tables.copy(), np.zeros(num_classes * NUM_BINS, dtype=np.float64))


def count(table: Float64, kind: int, bin_: int, touches: int) -> None:
    """Count touches of a class in `reached` or `reused`."""
    table[kind, bin_] += touches
    table[-1, bin_] += touches


def appraise(life: Life, kind: int, horizon: float, chunks: float, earning: float) -> None:
    """Set the values of a class. horizon is in requests, chunks is the mean of a request, earning the mean hits of a place per request."""
    reached, reused = life.reached, life.reused
    lean = LEAN * chunks
    first = kind * NUM_BINS
    guess = FIRST_GUESS
    for k in range(NUM_BINS):
        guess = (reused[-1, k] + lean * guess) / (reached[-1, k] + lean)
        life.value[first + k] = min(1.0, (reused[kind, k] + lean * guess) / (reached[kind, k] + lean))
        guess *= GUESS_FADES
    # So far value holds the chance of a touch in each bin; bin k is overwritten when the later ones still have theirs.
    for k in range(NUM_BINS):
        alive, hits, time, value = 1.0, 0.0, 0.0, 0.0
        look = horizon
        for later in range(k, NUM_BINS):
            width = float(life.lower[later + 1] - life.lower[later])
            chance = life.value[first + later]
            while time + width >= look and look <= FARTHEST * horizon:
                value = max(value, (hits + alive * chance * (look - time) / width) / look)
                look *= 2.0
            if look > FARTHEST * horizon:
                break
            hits += alive * chance
            alive *= 1.0 - chance
            time += width
        if value < NOISE * earning:
            value = NOISE * earning * (NUM_BINS - k) / NUM_BINS
        life.value[first + k] = value
    for k in range(NUM_BINS):
        reached[-1, k] = max(0.0, reached[-1, k] - (1.0 - KEEP) * reached[kind, k])
        reused[-1, k] = max(0.0, reused[-1, k] - (1.0 - KEEP) * reused[kind, k])
        reached[kind, k] *= KEEP
        reused[kind, k] *= KEEP
