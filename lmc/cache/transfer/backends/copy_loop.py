"""The compiled inner loop of the host backend. Importing it imports Numba."""

from __future__ import annotations

from numba import njit, types
from numba.core import typing

_word = types.uintp
_memmove = types.ExternalFunction("memmove", typing.signature(_word, _word, _word, _word))


@njit("void(uint64[::1], uint64[::1], uint64[::1])", nogil=True, cache=True)
def copy_loop(src, dst, size):  # type: ignore[no-untyped-def] # Numba's types are in the signature
    for index in range(len(size)):
        _memmove(dst[index], src[index], size[index])
