"""Cuts token ids into trace blocks, with chained names as the cache makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmc.cache.keys import KEY_BYTES, ChunkKey, KeyChain
from lmc.cache.observe.record import NAME_BYTES
from lmc.sim.trace import Int64


def hash_tokens(tokens: Sequence[int], block_tokens: int) -> Int64:
    """(num_full_blocks,) the first NAME_BYTES of the key of each full trace block, as lmc's own record writes them."""
    keys = KeyChain(ChunkKey(bytes(KEY_BYTES)), block_tokens).extend(tokens)
    return np.frombuffer(b"".join(key[:NAME_BYTES] for key in keys), dtype=np.int64)
