"""Numba's decorator with a type: compiled code runs without the GIL and is kept on disk for the next process."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from numba import njit

P = ParamSpec("P")
R = TypeVar("R")


def compiled(signature: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """signature: of Numba's types, to compile at once for these; None: on first use."""

    def compile_one(function: Callable[P, R]) -> Callable[P, R]:
        try:
            made = njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # Numba finds no folder that it may write to: compile anew in every process
            made = njit(signature, nogil=True)(function)
        return cast(Callable[P, R], made)

    return compile_one
