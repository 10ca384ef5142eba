"""Names of chunks: a namespace and a hash chained over every token from the start.

Two chunks with the same key on the same rank hold interchangeable bytes; chunks that could differ never share a key. A key depends on
nothing of the process: no seed, no pickle, no Python hash().
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal, NewType, cast

from blake3 import blake3

from lmc.errors import ConfigError

ChunkKey = NewType("ChunkKey", bytes)  # 32 bytes
Element = Literal["opaque", "bf16", "fp16", "fp32", "fp8"]  # what a chunk's KV consists of

KEY_BYTES = 32
KEY_VERSION = 1


@dataclass(frozen=True)
class Namespace:
    """What is equal for all chunks of one engine, on every rank."""

    engine: str  # "vllm" or "sglang": their blocks differ inside
    model: str
    revision: str
    kv_dtype: str
    layout: str  # KVLayout.fingerprint
    chunk_tokens: int
    tp_size: int = 1  # parts of a chunk; of ranks that are known to hold the same bytes only one counts
    pp_size: int = 1

    def digest(self) -> bytes:
        return blake3(_encode("lmc-namespace", KEY_VERSION, *(getattr(self, f.name) for f in fields(self)))).digest()

    def label(self) -> str:
        """A short name that is safe in a path or a Redis key."""
        return self.digest().hex()[:16]


@lru_cache(maxsize=1024)
def root(namespace: Namespace, *, lora: str = "", tenant: str = "", salt: str = "") -> ChunkKey:
    """The start of a chain: chunks of different adapters, tenants or salts never meet."""
    last = (salt,) if salt else ()
    return ChunkKey(blake3(_encode("lmc-root", namespace.digest().hex(), lora, tenant, *last)).digest())


def hashed_name(text: str) -> str:
    """32 characters that stand for a text of any length and content; empty for the empty text."""
    return blake3(text.encode(errors="surrogatepass")).hexdigest()[:32] if text else ""


class KeyChain:
    """The keys of one growing token sequence.

    identity, if given, maps a token range (start, end) to bytes that stand for what the token ids don't say, such as the hashes of images
    whose placeholders lie in the range.
    """

    def __init__(self, start: ChunkKey, chunk_tokens: int, identity: Callable[[int, int], bytes] | None = None) -> None:
        if chunk_tokens <= 0:
            raise ConfigError(f"chunk_tokens must be positive, not {chunk_tokens}")
        self.keys: list[ChunkKey] = []
        self._start = start
        self._chunk_tokens = chunk_tokens
        self._identity = identity

    def extend(self, tokens: Sequence[int]) -> list[ChunkKey]:
        """Hash the full chunks of tokens (the whole sequence so far) that are not hashed yet; returns all keys."""
        size = self._chunk_tokens
        parent: bytes = self.keys[-1] if self.keys else self._start
        first = len(self.keys) * size
        num_new = (len(tokens) - first) // size
        if num_new <= 0:
            return self.keys
        whole = first == 0 and isinstance(tokens, list)  # saves a copy; what is beyond the last full chunk does no harm
        fresh = array("I", tokens if whole else tokens[first : first + num_new * size])
        if sys.byteorder != "little":
            fresh.byteswap()
        raw = memoryview(fresh).cast("B")
        width = size * fresh.itemsize
        keys = cast("list[bytes]", self.keys)  # NewType costs a call
        for start in range(0, num_new * width, width):
            hasher = blake3(raw[start : start + width], key=parent)
            if self._identity is not None:
                position = first + start // fresh.itemsize
                hasher.update(self._identity(position, position + size))  # behind tokens of a fixed length
            parent = hasher.digest()
            keys.append(parent)
        return self.keys


def _encode(*parts: str | int) -> bytes:
    """Length-prefixed, so that no two different lists of parts give the same bytes."""
    encoded = [part.encode() if isinstance(part, str) else b"%d" % part for part in parts]
    return b"".join(struct.pack("<I", len(part)) + part for part in encoded)
