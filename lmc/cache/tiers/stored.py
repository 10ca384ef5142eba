"""Between a raw chunk and what a tier stores of it: encoding before a put, verification and decoding after a get."""

from __future__ import annotations

import time
from typing import NamedTuple

from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.codec import decode, encode
from lmc.cache.tiers.format import Coding, TierScope, checksum, stored_bytes
from lmc.errors import Corrupt


class Moved(NamedTuple):
    """What a put or a get has moved: bytes in the tier with the footer, and the seconds that the codec took; 0 when it did not run."""

    stored_bytes: int
    codec_seconds: float = 0.0


NOTHING = Moved(0)


class Packed(NamedTuple):
    payload: memoryview  # valid until this thread packs again
    coding: Coding | None
    seconds: float


def pack(scope: TierScope, raw: memoryview) -> Packed:
    """What to store of a raw chunk: the chunk itself, unless the scope's code makes it shorter."""
    if scope.compress == "none":
        return Packed(raw, None, 0.0)
    started = time.perf_counter()
    encoded = encode(scope.compress, scope.element, raw)
    coding = Coding(scope.compress, scope.element, len(raw), checksum(raw)) if encoded is not None else None
    return Packed(raw if encoded is None else encoded, coding, time.perf_counter() - started)


def unpack(
    scope: TierScope, key: ChunkKey, payload: memoryview, footer: memoryview, payload_checksum: int, out: memoryview
) -> Moved:
    """Verify what was stored, and decode it into out; a payload that is not encoded stays where it is.

    Raises Corrupt, and out may hold anything then.
    """
    size = stored_bytes(len(payload))
    coding = scope.verify(key, footer, payload_checksum, len(payload), len(out))
    if coding is None:
        return Moved(size)
    started = time.perf_counter()
    decode(coding.compress, coding.element, payload, out)
    if checksum(out) != coding.raw_checksum:
        raise Corrupt("what was decoded does not match the checksum of the raw chunk")
    return Moved(size, time.perf_counter() - started)
