"""Learns for the predictive policy how likely a chunk of a class, untouched up to some age, is touched again, and when.

Ages are counted in requests and fall into *bins*, two an octave. For each class and bin the tables hold how many touches lived to that age
and how many ended there in another touch (a life table, Kaplan and Meier 1958); old counts fade. Where a class has seen little, it leans on
all classes together, and then on its own younger ages.

The *value* of a chunk is the most hits per request of waiting that any choice of when to give up promises: the index of Gittins (1979),
of which the hit density of LHD (Beckmann et al., NSDI 2018) is the case without a choice. To keep what has the highest is the best that
can be done with the chances known.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

NUM_BINS = 39  # up to a million requests
FIRST_GUESS = 0.1  # share of chunks touched again in a bin, before anything is known
FADES = 0.8  # a chance that is carried on to the next bin
KEEP = 0.99  # of old counts, each time a class is appraised
LEAN = 3.0  # requests' worth of chunks that the guess counts as
LEAN_ON_AGES = 4.0  # as many for the younger ages


class Life(NamedTuple):
    lower: Int64  # (NUM_BINS + 1,) the least age of a bin; 0 is the running request and belongs to the first
    reached: Float64  # (num_classes + 1, NUM_BINS) touches that lived to the bin; the last row is all classes together
    reused: Float64  # (num_classes + 1, NUM_BINS) touches that ended in the bin with another touch
    value: Float64  # (num_classes * NUM_BINS,)
    spans: Float64  # (3, NUM_BINS) for appraise(): hits, requests of waiting and share that outlives each span of ages


def make_life(num_classes: int) -> Life:
    lower = np.array([1, 2, 3, *(int(2 ** (k / 2)) for k in range(4, NUM_BINS + 1)), 1 << 62], dtype=np.int64)
    tables = np.zeros((num_classes + 1, NUM_BINS), dtype=np.float64)
    value = np.zeros(num_classes * NUM_BINS, dtype=np.float64)
    return Life(lower, tables, tables.copy(), value, np.zeros((3, NUM_BINS), dtype=np.float64))


def count(table: Float64, kind: int, bin_: int, touches: int) -> None:
    """Add touches of a class to the table `reached` or `reused`."""
    table[kind, bin_] += touches
    table[-1, bin_] += touches


def appraise(life: Life, kind: int, chunks: float) -> None:
    """Compute the values of a class, and let its counts fade. chunks is the mean number of chunks of a request."""
    reached, reused, value = life.reached, life.reused, life.value
    lean, lean_on_ages = LEAN * chunks, LEAN_ON_AGES * chunks
    first = kind * NUM_BINS
    guess = FIRST_GUESS
    chance = 0.0
    for k in range(NUM_BINS):  # value holds the chances at first
        lived, ended = float(reached[kind, k]), float(reused[kind, k])
        all_lived, all_ended = float(reached[-1, k]), float(reused[-1, k])
        guess = (all_ended + lean * guess) / (all_lived + lean)
        likely = max((ended + lean * guess) / (lived + lean), FADES * chance)
        chance = min(1.0, (ended + lean_on_ages * likely) / (lived + lean_on_ages))
        value[first + k] = chance
        guess *= FADES
        reached[-1, k] = max(0.0, all_lived - (1.0 - KEEP) * lived)
        reused[-1, k] = max(0.0, all_ended - (1.0 - KEEP) * ended)
        reached[kind, k] = KEEP * lived
        reused[kind, k] = KEEP * ended
    index(life, first)


def index(life: Life, first: int) -> None:
    """Turn probabilities into values.

    Ages, from the oldest on, form spans; a span whose successor promises more hits per request takes it in.
    """
    lower, value, spans = life.lower, life.value, life.spans
    top = -1
    value[first + NUM_BINS - 1] = 0.0
    for k in range(NUM_BINS - 2, -1, -1):
        hits = float(value[first + k])
        wait = float(lower[k + 1] - lower[k]) * (1.0 - 0.5 * hits)
        alive = 1.0 - hits
        while top >= 0 and spans[0, top] * wait > hits * spans[1, top]:
            hits += alive * float(spans[0, top])
            wait += alive * float(spans[1, top])
            alive *= float(spans[2, top])
            top -= 1
        top += 1
        spans[0, top] = hits
        spans[1, top] = wait
        spans[2, top] = alive
        value[first + k] = hits / wait
