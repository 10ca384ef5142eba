"""The persisted form of a chunk: the payload, as it was in the host slot or encoded, then one page of footer.

The same bytes lie on disk, in Redis and in S3. The footer says what the payload is (namespace, rank, key, layout), which chunk comes before
it, how long it is and what it hashes to, and carries a checksum of itself that covers the padding too. If the payload is encoded, it says
how, and how long the raw chunk is and what that hashes to, so that a fault of the code is found, too. It comes last, so that a payload can
be hashed while it is being sent, piece by piece, and is FOOTER_BYTES long, so that direct output ends on a page. All numbers are
little-endian. Names of stored chunks contain FORMAT, so one version of lmc never meets the chunks of another one.

A checksum finds accidents; who can write to the medium can make one, too. With an auth_key the payload's hash and a seal of the footer are
keyed BLAKE3, at the footer's end; without that key nobody can make them, and a chunk that lacks them is refused as forged.

Version 2 added the parent, so that a restart knows which chunk continues which; version 3 put the header of before behind the payload;
version 4 added the code.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import xxhash
from blake3 import blake3

from lmc.cache.keys import KEY_BYTES, ChunkKey, Element
from lmc.cache.sections import Compress
from lmc.cache.tiers.codec import COMPRESS, ELEMENTS
from lmc.errors import ConfigError, Corrupt, Forged

FOOTER_BYTES = 4096
VERSION = 4
FORMAT = f"v{VERSION}"  # the part of a file's or a remote key's name that changes with the version

_MAGIC = b"LMCCHUNK"
_NO_KEY = ChunkKey(bytes(KEY_BYTES))  # stands for the parent of the first chunk of a prefix

# magic, version, footer bytes, footer checksum, payload bytes, payload checksum, rank, key, parent, code, element, raw bytes, raw checksum,
# namespace length, layout length
_FIXED = struct.Struct(f"<8sHHQQQI{KEY_BYTES}s{KEY_BYTES}sBBQQHH")
_START = struct.Struct("<8sHH")
_CHECKSUM = struct.Struct("<Q")
_FIELD = (1 << 64) - 1
_PAYLOAD = struct.Struct("<QQI")  # bytes, checksum, rank; then comes the key
_CHECKSUM_AT = _START.size
_PAYLOAD_AT = _CHECKSUM_AT + _CHECKSUM.size
_KEY_AT = _PAYLOAD_AT + _PAYLOAD.size
_PARENT_AT = _KEY_AT + KEY_BYTES
_CODING = struct.Struct("<BBQQ")  # zeros when the payload is as it was in the slot
_CODING_AT = _PARENT_AT + KEY_BYTES
_LENGTHS_AT = _CODING_AT + _CODING.size
_HASH_BYTES = 32
_SEAL_AT = FOOTER_BYTES - _HASH_BYTES
_HASH_AT = _SEAL_AT - _HASH_BYTES  # of the payload; both are zeros without an auth_key
_TEXT_BYTES = _HASH_AT - _FIXED.size
_THIS_VERSION = _START.pack(_MAGIC, VERSION, FOOTER_BYTES)


class Hasher(Protocol):
    """Hashes a payload piece by piece."""

    def update(self, data: memoryview, /) -> object: ...

    def intdigest(self) -> int: ...


class _KeyedHasher:
    def __init__(self, auth_key: bytes) -> None:
        self._hasher = blake3(key=auth_key)

    def update(self, data: memoryview, /) -> None:
        self._hasher.update(data)

    def intdigest(self) -> int:
        return int.from_bytes(self._hasher.digest(), "little")


def derive_auth_key(text: str) -> bytes:
    """The key of 32 bytes for an auth_key as people write it."""
    return blake3(text.encode(), derive_key_context="lmc 2026 auth_key of stored chunks").digest()


def stored_bytes(chunk_bytes: int) -> int:
    """Bytes that a persisted chunk takes."""
    return chunk_bytes + FOOTER_BYTES


class Coding(NamedTuple):
    """How a payload is encoded, and what it is when it is decoded."""

    compress: Compress
    element: Element
    raw_bytes: int
    raw_checksum: int  # xxh3-64


@dataclass(frozen=True)
class ChunkFooter:
    namespace: str
    rank: int
    layout: str
    key: ChunkKey
    payload_bytes: int
    checksum: int  # xxh3-64 of the payload; with an auth_key, the first 8 bytes of its keyed hash
    parent: ChunkKey | None = None  # None: the chunk is the first of its prefix
    coding: Coding | None = None  # None: the payload is the raw chunk

    @property
    def raw_bytes(self) -> int:
        return self.payload_bytes if self.coding is None else self.coding.raw_bytes


@dataclass(frozen=True)
class TierScope:
    """The chunks that one tier object stores: those of one rank of one namespace, of chunk_bytes or one of the smaller part_bytes."""

    namespace: str  # Namespace.label()
    rank: int
    layout: str  # KVLayout.fingerprint
    chunk_bytes: int
    auth_key: bytes = field(
        default=b"", repr=False
    )  # of derive_auth_key(); empty: chunks are checked, not authenticated
    element: Element = "opaque"  # what the KV consists of
    compress: Compress = "none"  # how chunks are stored; those that were stored otherwise are read all the same
    part_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.chunk_bytes <= 0 or self.rank < 0:
            raise ConfigError(f"chunk size {self.chunk_bytes} must be positive and rank {self.rank} not negative")
        if not self.namespace.isalnum():
            raise ConfigError(f"namespace label {self.namespace!r} must consist of letters and digits")
        if len(self.namespace.encode()) + len(self.layout.encode()) > _TEXT_BYTES:
            raise ConfigError(f"the layout fingerprint has {len(self.layout)} characters; at most {_TEXT_BYTES} fit")

    def check_size(self, data: memoryview) -> None:
        """Raise ConfigError unless data is as long as a chunk or a part of one."""
        if len(data) not in self.sizes:
            raise ConfigError(f"a chunk of this tier has {self.chunk_bytes} bytes, not {len(data)}")

    @cached_property
    def sizes(self) -> frozenset[int]:
        """Bytes that a payload may have."""
        return frozenset((self.chunk_bytes, *self.part_bytes))

    def hasher(self) -> Hasher:
        """For a payload: xxh3-64, or keyed BLAKE3 with an auth_key."""
        return _KeyedHasher(self.auth_key) if self.auth_key else xxhash.xxh3_64()

    def checksum(self, data: memoryview) -> int:
        """What hasher() says of the whole payload."""
        if not self.auth_key:
            return checksum(data)
        hasher = self.hasher()
        hasher.update(data)
        return hasher.intdigest()

    def seal(
        self,
        key: ChunkKey,
        payload_checksum: int,
        parent: ChunkKey | None,
        payload_bytes: int,
        coding: Coding | None,
    ) -> bytes:
        """The footer to store behind a payload of that checksum. payload_bytes: as stored."""
        page = bytearray(self._blank)
        payload = self._payload(key, payload_checksum, payload_bytes)
        page[_PAYLOAD_AT:_LENGTHS_AT] = payload + (parent or _NO_KEY) + _CODING.pack(*_coding_numbers(coding))
        if self.auth_key:
            page[_HASH_AT:_SEAL_AT] = payload_checksum.to_bytes(_HASH_BYTES, "little")
            page[_SEAL_AT:] = self._authentication(page)
        return _seal_page(page)

    def verify(
        self, key: ChunkKey, page: memoryview, payload_checksum: int, payload_bytes: int, raw_bytes: int
    ) -> Coding | None:
        """How the payload is encoded. raw_bytes: of what was put.

        Raises Corrupt unless page is the footer of this key in this scope with a payload of that checksum and length, and Forged when it is
        the footer of some chunk, but not sealed with the auth_key.
        """
        if (
            page[_PAYLOAD_AT:_PARENT_AT] == self._payload(key, payload_checksum, payload_bytes)
            and page[_LENGTHS_AT : _LENGTHS_AT + len(self._texts)] == self._texts
            and page[:_CHECKSUM_AT] == _THIS_VERSION
            and page[_CHECKSUM_AT:_PAYLOAD_AT] == _page_checksum(page)
            and self._is_authentic(page, payload_checksum)
        ):
            coding = _read_coding(page)
            if raw_bytes == (payload_bytes if coding is None else coding.raw_bytes):
                return coding  # of any parent: the page's checksum covers it
        try:
            footer = decode(page)
        except Corrupt:
            if payload_bytes == raw_bytes:
                raise
            raise Corrupt(
                f"it has {stored_bytes(payload_bytes)} bytes instead of {stored_bytes(raw_bytes)}, and no footer of an encoded chunk"
            ) from None
        if self.auth_key and not hmac.compare_digest(page[_SEAL_AT:], self._authentication(page)):
            raise Forged("it is not sealed with this cache's auth_key")
        found = (footer.namespace, footer.rank, footer.layout, footer.key, footer.raw_bytes)
        wanted = (self.namespace, self.rank, self.layout, key, raw_bytes)
        names = ("namespace", "rank", "layout", "key", "size")
        wrong = [name for name, have, want in zip(names, found, wanted, strict=True) if have != want]
        if wrong:
            raise Corrupt(f"stored under another {' and '.join(wrong)}")
        if is_sealed(page) and not self.auth_key:
            raise Corrupt("it was stored with an auth_key, and this cache has none")
        raise Corrupt("the payload does not match its checksum")

    def _is_authentic(self, page: memoryview, payload_checksum: int) -> bool:
        if not self.auth_key:
            return True
        payload_hash = payload_checksum.to_bytes(_HASH_BYTES, "little")
        return hmac.compare_digest(page[_HASH_AT:_SEAL_AT], payload_hash) and hmac.compare_digest(
            page[_SEAL_AT:], self._authentication(page)
        )

    def _authentication(self, page: bytes | bytearray | memoryview) -> bytes:
        """Of the page up to here, whose own checksum counts as zeros."""
        hasher = blake3(page[:_CHECKSUM_AT], key=self.auth_key)
        hasher.update(bytes(_CHECKSUM.size))
        hasher.update(page[_PAYLOAD_AT:_SEAL_AT])
        return hasher.digest()

    def _payload(self, key: ChunkKey, payload_checksum: int, payload_bytes: int) -> bytes:
        return _PAYLOAD.pack(payload_bytes, payload_checksum & _FIELD, self.rank) + key

    @cached_property
    def _blank(self) -> bytes:
        return bytes(_unsealed(ChunkFooter(self.namespace, self.rank, self.layout, _NO_KEY, self.chunk_bytes, 0)))

    @cached_property
    def _texts(self) -> bytes:
        """Namespace and layout, and their lengths before them."""
        used = _FIXED.size + len(self.namespace.encode()) + len(self.layout.encode())
        return self._blank[_LENGTHS_AT:used]


def is_sealed(page: bytes | bytearray | memoryview) -> bool:
    """Whether the footer was made with an auth_key."""
    return any(page[_HASH_AT:])


def checksum(data: memoryview | bytes) -> int:
    """xxh3-64."""
    return xxhash.xxh3_64_intdigest(data)


def encode(footer: ChunkFooter) -> bytes:
    return _seal_page(_unsealed(footer))


def _unsealed(footer: ChunkFooter) -> bytearray:
    namespace, layout = footer.namespace.encode(), footer.layout.encode()
    numbers = [VERSION, FOOTER_BYTES, 0, footer.payload_bytes, footer.checksum, footer.rank]
    page = bytearray(FOOTER_BYTES)
    lengths = (len(namespace), len(layout))
    _FIXED.pack_into(
        page, 0, _MAGIC, *numbers, footer.key, footer.parent or _NO_KEY, *_coding_numbers(footer.coding), *lengths
    )
    page[_FIXED.size : _FIXED.size + len(namespace) + len(layout)] = namespace + layout
    return page


def _coding_numbers(coding: Coding | None) -> tuple[int, int, int, int]:
    if coding is None:
        return 0, 0, 0, 0
    code, element = COMPRESS.index(coding.compress), ELEMENTS.index(coding.element)
    return code, element, coding.raw_bytes, coding.raw_checksum


def _read_coding(page: bytes | bytearray | memoryview) -> Coding | None:
    """Raises Corrupt for a code of another lmc's."""
    code, element, raw_bytes, raw_checksum = _CODING.unpack_from(page, _CODING_AT)
    if code == 0:
        return None
    if code >= len(COMPRESS) or element >= len(ELEMENTS):
        raise Corrupt(f"it is encoded in a way that this lmc does not know (code {code}, element {element})")
    return Coding(COMPRESS[code], ELEMENTS[element], raw_bytes, raw_checksum)


def _seal_page(page: bytearray) -> bytes:
    page[_CHECKSUM_AT:_PAYLOAD_AT] = _page_checksum(page)
    return bytes(page)


def _page_checksum(page: bytes | bytearray | memoryview) -> bytes:
    """xxh3-64 of the page with zeros where its checksum is, as it is stored."""
    hasher = xxhash.xxh3_64(page[:_CHECKSUM_AT])
    hasher.update(bytes(_CHECKSUM.size))
    hasher.update(page[_PAYLOAD_AT:])
    return _CHECKSUM.pack(hasher.intdigest())


def decode(raw: bytes | bytearray | memoryview) -> ChunkFooter:
    """Read a footer. Raises Corrupt, also when another version of lmc wrote it: names keep versions apart, so it does not belong there."""
    page = bytearray(raw)
    if len(page) != FOOTER_BYTES:
        raise Corrupt(f"the footer has {len(page)} bytes instead of {FOOTER_BYTES}")
    magic, version, _, _, payload_bytes, digest, rank, key, parent, *rest = _FIXED.unpack_from(page)
    lengths = rest[-2:]
    if magic != _MAGIC:
        raise Corrupt("this is not a chunk of lmc, or not all of one")
    if version != VERSION:
        raise Corrupt(f"the footer is of version {version}; this lmc reads version {VERSION}")
    if page[_CHECKSUM_AT:_PAYLOAD_AT] != _page_checksum(page):
        raise Corrupt("the footer does not match its checksum")
    text = bytes(page[_FIXED.size :])
    namespace, layout = text[: lengths[0]], text[lengths[0] : sum(lengths)]
    return ChunkFooter(
        namespace.decode(),
        rank,
        layout.decode(),
        ChunkKey(key),
        payload_bytes,
        digest,
        ChunkKey(parent) if parent != _NO_KEY else None,
        _read_coding(page),
    )
