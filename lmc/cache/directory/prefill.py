"""What the engine takes to compute a prompt, as it was measured; and the fit of measured times, which the cost model uses as well.

A pass takes seconds for itself, for each of its tokens, and for each pair of a token with one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

_SUBSETS = [list(chosen) for size in (1, 2, 3) for chosen in combinations(range(3), size)]
_WEIGHT = 0.3  # of a measurement against those of its size before
_LEAST_TOKENS = 16  # of the first pass that is measured
# The first guess, which holds where too few sizes were measured to tell: a pass costs as much as so many tokens, and at this position a
# token's attention to those before it costs as much as all else of it.
_PASS_TOKENS = 64.0
_EQUAL_AT = 16_384.0
_GUESS_WEIGHT = 0.03  # of the guess in the fit, against a measurement


def fit(amounts: Float64, seconds: Float64, weights: Float64) -> Float64:
    """(3,) seconds of a pass, a token and a pair, none negative, with the least sum of squares of the relative errors.

    amounts: (n, 3) how many of each a measurement has. seconds, weights: (n,), for each measurement.
    """
    terms = amounts * (weights / seconds)[:, None]
    scale = np.maximum(np.sqrt((terms**2).sum(axis=0)), np.finfo(np.float64).tiny)
    terms = terms / scale
    products, wanted = terms.T @ terms, terms.T @ weights
    best, best_error = np.zeros(3), np.inf
    for chosen in _SUBSETS:
        found = np.zeros(3)
        try:
            found[chosen] = np.linalg.solve(products[np.ix_(chosen, chosen)], wanted[chosen])
        except np.linalg.LinAlgError:
            continue  # the measurements don't tell these parts apart
        missing = terms @ found - weights
        error = float(missing @ missing)
        if (found >= 0).all() and error < best_error * (1 - 1e-9):
            best, best_error = found, error
    return np.asarray(best / scale)


def amounts_of(parts: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """Of one pass. parts: for each request the position of its first token, and the number of its tokens."""
    return 1.0, float(sum(new for _, new in parts)), float(sum(new * (at + new / 2) for at, new in parts))


class PrefillTimes:
    """The last measurements, by the power of two of a pass's tokens and of their mean position."""

    def __init__(self) -> None:
        self._measured: dict[tuple[int, int], list[float]] = {}  # size -> mean amounts, and then seconds
        self._most = 1  # tokens of the largest pass
        self._fitted: Float64 | None = None  # None: to be fitted

    def learn(self, parts: Sequence[tuple[int, int]], seconds: float) -> None:
        call, tokens, pairs = amounts_of(parts)
        if seconds <= 0 or tokens < (1 if self._measured else _LEAST_TOKENS):
            return  # a few tokens show what a pass costs, and nothing of what a prompt costs
        size = int(tokens).bit_length(), int(pairs / tokens).bit_length()
        measured = [call, tokens, pairs, seconds]
        before = self._measured.get(size, measured)
        self._measured[size] = [old + _WEIGHT * (new - old) for old, new in zip(before, measured, strict=True)]
        self._most = max(self._most, int(tokens))
        self._fitted = None

    def seconds(self, position: int, new: int) -> float | None:
        """To compute `new` tokens after `position` others; None before a pass was measured."""
        if not self._measured:
            return None
        if self._fitted is None:
            self._fitted = self._fit()
        call, token, pair = self._fitted.tolist()
        return float(call * -(-new // self._most) + token * new + pair * new * (position + new / 2))

    def _fit(self) -> Float64:
        rows = np.array(list(self._measured.values()))
        largest = rows[rows[:, 1].argmax()]
        shape = np.array([_PASS_TOKENS, 1.0, 1 / _EQUAL_AT])
        shape *= largest[3] / float(shape @ largest[:3])
        guessed = np.array([[1.0, 1.0, 0.0], [1.0, largest[1], largest[1] * _EQUAL_AT]])
        amounts = np.concatenate([rows[:, :3], guessed])
        seconds = np.concatenate([rows[:, 3], guessed @ shape])
        weights = np.concatenate([np.ones(len(rows)), np.full(len(guessed), _GUESS_WEIGHT)])
        return fit(amounts, seconds, weights)
