"""The persisted form of a chunk: one header page, then the payload as it was in the host slot.

The same bytes lie on disk, in Redis and in S3. The header is HEADER_BYTES long, so that the payload starts on a page. It says what the
payload is (namespace, rank, key, layout), which chunk comes before it, how long it is and what it hashes to, and carries a checksum of
itself that covers the padding too. All numbers are little-endian. Names of stored chunks contain FORMAT, so one version of lmc never meets
the chunks of another one.

Version 2 added the parent, so that a restart knows which chunk continues which.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import cached_property

import xxhash

from lmc.cache.keys import KEY_BYTES, ChunkKey
from lmc.errors import ConfigError, Corrupt

HEADER_BYTES = 4096
VERSION = 2
FORMAT = f"v{VERSION}"  # the part of a file's or a remote key's name that changes with the version

_MAGIC = b"LMCCHUNK"
_NO_KEY = ChunkKey(bytes(KEY_BYTES))  # stands for the parent of the first chunk of a prefix

# magic, version, header bytes, header checksum, payload bytes, payload checksum, rank, key, parent, namespace length, layout length
_FIXED = struct.Struct(f"<8sHHQQQI{KEY_BYTES}s{KEY_BYTES}sHH")
_CHECKSUM_AT = struct.calcsize("<8sHH")
_PAYLOAD_CHECKSUM_AT = struct.calcsize("<8sHHQQ")
_KEY_AT = struct.calcsize("<8sHHQQQI")
_PARENT_AT = _KEY_AT + KEY_BYTES
_CHECKSUM = struct.Struct("<Q")
_TEXT_BYTES = HEADER_BYTES - _FIXED.size


def stored_bytes(chunk_bytes: int) -> int:
    """What a chunk takes where it is persisted."""
    return HEADER_BYTES + chunk_bytes


@dataclass(frozen=True)
class ChunkHeader:
    namespace: str
    rank: int
    layout: str
    key: ChunkKey
    payload_bytes: int
    checksum: int  # xxh3-64 of the payload
    parent: ChunkKey | None = None  # None: the chunk is the first of its prefix


@dataclass(frozen=True)
class TierScope:
    """What one tier object stores: chunks of one size, of one rank of one namespace."""

    namespace: str  # Namespace.label()
    rank: int
    layout: str  # KVLayout.fingerprint
    chunk_bytes: int

    def __post_init__(self) -> None:
        if self.chunk_bytes <= 0 or self.rank < 0:
            raise ConfigError(f"chunk size {self.chunk_bytes} must be positive and rank {self.rank} not negative")
        if not self.namespace.isalnum():
            raise ConfigError(f"namespace label {self.namespace!r} must consist of letters and digits")
        if len(self.namespace.encode()) + len(self.layout.encode()) > _TEXT_BYTES:
            raise ConfigError(f"the layout fingerprint has {len(self.layout)} characters; at most {_TEXT_BYTES} fit")

    def seal(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> bytes:
        """The header to store in front of data."""
        if len(data) != self.chunk_bytes:
            raise ConfigError(f"a chunk of this tier has {self.chunk_bytes} bytes, not {len(data)}")
        return self._header(key, parent or _NO_KEY, checksum(data))

    def verify(self, key: ChunkKey, page: bytes | memoryview, payload_checksum: int) -> None:
        """Raises Corrupt unless page is the header of this key in this scope with a payload of that checksum."""
        parent = ChunkKey(bytes(page[_PARENT_AT : _PARENT_AT + KEY_BYTES]))  # any: the header's own checksum covers it
        if bytes(page) == self._header(key, parent, payload_checksum):
            return
        header = decode(page)
        found = (header.namespace, header.rank, header.layout, header.key, header.payload_bytes)
        wanted = (self.namespace, self.rank, self.layout, key, self.chunk_bytes)
        names = ("namespace", "rank", "layout", "key", "size")
        wrong = [name for name, have, want in zip(names, found, wanted, strict=True) if have != want]
        if wrong:
            raise Corrupt(f"stored under another {' and '.join(wrong)}")
        raise Corrupt("the payload does not match its checksum")

    def _header(self, key: ChunkKey, parent: ChunkKey, payload_checksum: int) -> bytes:
        page = bytearray(self._blank)
        page[_KEY_AT : _PARENT_AT + KEY_BYTES] = key + parent
        _CHECKSUM.pack_into(page, _PAYLOAD_CHECKSUM_AT, payload_checksum)
        return _seal_page(page)

    @cached_property
    def _blank(self) -> bytes:
        return bytes(_unsealed(ChunkHeader(self.namespace, self.rank, self.layout, _NO_KEY, self.chunk_bytes, 0)))


def checksum(data: memoryview | bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def aligned_page() -> memoryview:
    """Room for a header, aligned so that O_DIRECT can fill it."""
    room = bytearray(2 * HEADER_BYTES)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(room)) % HEADER_BYTES
    return memoryview(room)[start : start + HEADER_BYTES]


def encode(header: ChunkHeader) -> bytes:
    return _seal_page(_unsealed(header))


def _unsealed(header: ChunkHeader) -> bytearray:
    namespace, layout = header.namespace.encode(), header.layout.encode()
    numbers = [VERSION, HEADER_BYTES, 0, header.payload_bytes, header.checksum, header.rank]
    page = bytearray(HEADER_BYTES)
    _FIXED.pack_into(page, 0, _MAGIC, *numbers, header.key, header.parent or _NO_KEY, len(namespace), len(layout))
    page[_FIXED.size : _FIXED.size + len(namespace) + len(layout)] = namespace + layout
    return page


def _seal_page(page: bytearray) -> bytes:
    _CHECKSUM.pack_into(page, _CHECKSUM_AT, xxhash.xxh3_64_intdigest(page))
    return bytes(page)


def decode(raw: bytes | bytearray | memoryview) -> ChunkHeader:
    """Read a header. Raises Corrupt, also when another version of lmc wrote it: names keep versions apart, so it does not belong there."""
    page = bytearray(raw)
    if len(page) != HEADER_BYTES:
        raise Corrupt(f"the header has {len(page)} bytes instead of {HEADER_BYTES}")
    magic, version, _, own, payload_bytes, digest, rank, key, parent, *lengths = _FIXED.unpack_from(page)
    if magic != _MAGIC:
        raise Corrupt("this is not a chunk of lmc")
    if version != VERSION:
        raise Corrupt(f"the header is of version {version}; this lmc reads version {VERSION}")
    _CHECKSUM.pack_into(page, _CHECKSUM_AT, 0)
    if xxhash.xxh3_64_intdigest(page) != own:
        raise Corrupt("the header does not match its checksum")
    text = bytes(page[_FIXED.size :])
    namespace, layout = text[: lengths[0]], text[lengths[0] : sum(lengths)]
    return ChunkHeader(
        namespace.decode(),
        rank,
        layout.decode(),
        ChunkKey(key),
        payload_bytes,
        digest,
        ChunkKey(parent) if parent != _NO_KEY else None,
    )
