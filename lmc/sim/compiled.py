"""Numba's decorator with a type: compiled on first use, kept on disk for the next process."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from numba import njit

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    return cast(Callable[P, R], njit(cache=True, nogil=True)(function))
