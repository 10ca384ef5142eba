"""A tournament tree over numbered lists, which finds the list with the least value.

tree is (2 * leaves,), leaves a power of two; tree[leaves + number] is the value of a list, or EMPTY, and each inner place has the least of
the two below it. A change costs at most the depth, a fixed number.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

EMPTY = 1e300


def make_tree(leaves: int) -> Float64:
    return np.full(2 * leaves, EMPTY, dtype=np.float64)


def set_leaf(tree: Float64, number: int, value: float) -> None:
    place = tree.size // 2 + number
    if tree[place] == value:
        return
    tree[place] = value
    while place > 1:
        least = tree[place ^ 1]
        if value < least:
            least = value
        place //= 2
        if tree[place] == least:
            return
        tree[place] = least
        value = least


def least_leaf(tree: Float64, guess: int) -> int:
    """Return the number of a list with the least value: `guess` if it is one, else the lowest such number."""
    leaves = tree.size // 2
    least = tree[1]
    if tree[leaves + guess] == least:
        return guess
    place = 1
    while place < leaves:
        place *= 2
        if tree[place] != least:
            place += 1
    return place - leaves
