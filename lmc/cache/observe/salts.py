"""Notices that a prompt misses only because its tenant or adapter differs from that of an earlier one. A bounded memory of first chunks."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import xxhash

_REMEMBERED = 8_192
_MANY = b""  # first chunks that came under several roots


class Salts:
    """Hashes are only compared inside this process and decide nothing but a label in the metrics."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._roots: OrderedDict[int, bytes] = OrderedDict()  # first chunk's tokens -> the root it came under

    def seen_elsewhere(self, tokens: Sequence[int], root: bytes) -> bool:
        """Whether the first chunk of tokens came before under another root than this one; remembers it under this one."""
        first = xxhash.xxh3_64_intdigest(array("I", tokens[: self._chunk_tokens]))
        known = self._roots.get(first)
        elsewhere = known is not None and known != root
        self._roots[first] = _MANY if elsewhere else root
        self._roots.move_to_end(first)
        if len(self._roots) > _REMEMBERED:
            self._roots.popitem(last=False)
        return elsewhere
