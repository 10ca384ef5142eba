"""Blocks from token ids, with the cache's own chained names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmc.cache.keys import KEY_BYTES, ChunkKey, KeyChain
from lmc.sim.trace import Int64


def hash_tokens(tokens: Sequence[int], block_tokens: int) -> Int64:
    """The first 8 bytes of the key of each full block, as lmc's own record writes them."""
    keys = KeyChain(ChunkKey(bytes(KEY_BYTES)), block_tokens).extend(tokens)
    return np.frombuffer(b"".join(key[:8] for key in keys), dtype=np.int64)
