"""Lossless compression of a chunk's bytes, by what the elements of its KV are.

In KV of 16 or 32 bits only the exponent has less to say than it has room for: signs and mantissas look like noise. So the bytes that hold
the exponents are stored apart from the others, which stay as they are. Two codes shorten them:

lossless      a code of 3, 4 or 6 bits, whichever is the shortest for a block of 8 KiB, with whole bytes for what it has no code for
lossless-max  Zstandard, which comes to within a hundredth of the entropy, at a third of the speed

A chunk that does not get shorter has no encoded form. docs/compression.md says what else was tried. Nothing here trusts what it decodes.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Collection
from functools import cache, cached_property
from types import ModuleType
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from lmc.cache.keys import Element
from lmc.cache.sections import Compress
from lmc.errors import Corrupt, TierError

COMPRESS: tuple[Compress, ...] = get_args(Compress)  # what stands in a footer is an index into these
ELEMENTS: tuple[Element, ...] = get_args(Element)

_SIZES: dict[Element, int] = {"bf16": 2, "fp16": 2, "fp32": 4}  # of elements whose top byte is coded apart
_DTYPES: dict[str, Element] = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}
# Engines' names for KV that they keep as bytes without anything between the numbers.
_FP8_IN_BYTES = ("fp8", "fp8_e4m3", "fp8_e5m2", "float8_e4m3fn", "float8_e5m2")
_WORD = 8
_LENGTHS = struct.Struct("<II")  # words of body and bytes of escapes
_PAGE = 4096  # so that the encoded form can be written past the page cache
# Exponents without order have no repetitions worth a search: blocks of 16 KiB get codes of their own instead.
_SEARCH = {"min_match": 7, "window_log": 14, "hash_log": 6}

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]


class _Room(threading.local):
    """Memory of one thread, kept from chunk to chunk: fresh memory would cost as much as the code."""

    def __init__(self) -> None:
        self._kept: dict[str, Words] = {}

    def words(self, name: str, count: int) -> Words:
        room = self._kept.get(name)
        if room is None or room.size < count:
            fresh = np.empty(count + _PAGE // _WORD, np.uint64)
            start = -fresh.ctypes.data % _PAGE // _WORD
            room = self._kept[name] = fresh[start : start + count]
        return room[:count]

    @cached_property
    def compressor(self) -> Any:  # of a library without types
        zstandard = _zstandard()
        return zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters.from_level(1, **_SEARCH))

    @cached_property
    def decompressor(self) -> Any:
        return _zstandard().ZstdDecompressor()


_room = _Room()


def prepare(compress: Compress, element: Element) -> None:
    """Import and compile what this code needs, and what stored chunks of such elements need, which may be of another code.

    That takes seconds when it was never compiled, else a thirtieth of a second. Raises TierError where the code cannot be had.
    """
    if element in _SIZES or element == "opaque":  # a node is not told what its engines' KV consists of
        codec_loop()
    if compress == "lossless-max":
        _zstandard()


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise TierError("lossless-max needs the package zstandard; install it, or use lossless") from error
    return zstandard


@cache
def codec_loop() -> ModuleType:
    """lmc.cache.tiers.codec_loop, compiled or read from Numba's cache. Imported when it is needed, as in file_read."""
    from lmc.cache.tiers import codec_loop

    return codec_loop


def room_for(raw_bytes: int) -> memoryview:
    """Memory of this thread for the stored form of a chunk, which is overwritten by its next call."""
    return _room.words("stored", -(-raw_bytes // _WORD)).view(np.uint8).data[:raw_bytes]


def element_of(dtypes: Collection[str], kv_dtype: str) -> Element:
    """What the KV consists of. dtypes: torch's names of the tensors' types; kv_dtype: as Namespace has it, the KV's own type last."""
    found = {_DTYPES.get(dtype, "opaque") for dtype in dtypes}
    if set(dtypes) == {"uint8"} and kv_dtype.rpartition("/")[2].removeprefix("torch.") in _FP8_IN_BYTES:
        return "fp8"
    return found.pop() if len(found) == 1 else "opaque"


def codes_for(element: Element) -> tuple[Compress, ...]:
    """The codes that can shorten such elements."""
    if element == "opaque":
        return ()
    return ("lossless", "lossless-max") if element in _SIZES else ("lossless-max",)


def encode(compress: Compress, element: Element, raw: memoryview) -> memoryview | None:
    """The encoded form, valid until this thread encodes again, or None when it would not be shorter."""
    if compress not in codes_for(element):
        return None
    encoded = _encode_fast(element, raw) if compress == "lossless" else _encode_max(element, raw)
    return encoded if encoded is not None and len(encoded) < len(raw) else None


def decode(compress: Compress, element: Element, encoded: memoryview, out: memoryview) -> None:
    """Fill out, of the raw chunk's size. Raises Corrupt for what encode() cannot have written; a checksum must judge the rest."""
    if compress not in codes_for(element):
        raise Corrupt(f"the footer names a code that does not exist: {compress} for {element}")
    good = (_decode_fast if compress == "lossless" else _decode_max)(element, encoded, out)
    if not good:
        raise Corrupt(f"what was stored cannot be decoded as {compress}")


def _encode_fast(element: Element, raw: memoryview) -> memoryview | None:
    size = _SIZES[element]
    loop = codec_loop()
    blocks = len(raw) // (loop.WORDS * _WORD)
    if blocks == 0:
        return None
    words, tail = _blocks(raw, blocks)
    table_words = -(-blocks * loop.TABLE_ENTRY // _WORD)
    stored = _room.words("encoded", 1 + table_words + words.size + words.size // size + -(-tail.size // _WORD))
    table = stored[1 : 1 + table_words].view(np.uint8)[: blocks * loop.TABLE_ENTRY]
    stored[:1], stored[table_words] = 0, 0
    body = stored[1 + table_words :][: words.size]
    escapes = _room.words("escapes", words.size // size).view(np.uint8)
    num_words, num_escapes = loop.encode(words, size, table, body, escapes, _room.words("block", loop.SCRATCH_WORDS))
    whole = stored.view(np.uint8)
    _LENGTHS.pack_into(whole.data, 0, num_words, num_escapes)
    end = (1 + table_words + num_words) * _WORD
    whole[end : end + num_escapes] = escapes[:num_escapes]
    whole[end + num_escapes : end + num_escapes + tail.size] = tail
    return whole.data[: end + num_escapes + tail.size]


def _decode_fast(element: Element, encoded: memoryview, out: memoryview) -> bool:
    loop, size = codec_loop(), _SIZES[element]
    blocks = len(out) // (loop.WORDS * _WORD)
    table_words = -(-blocks * loop.TABLE_ENTRY // _WORD)
    source = _aligned(encoded)
    if blocks == 0 or source.size < _WORD * (1 + table_words):
        return False
    num_words, num_escapes = _LENGTHS.unpack_from(source.data)
    start = _WORD * (1 + table_words)
    end = start + _WORD * num_words
    tail = len(out) - blocks * loop.WORDS * _WORD
    if source.size != end + num_escapes + tail:
        return False
    words = _words_of(out, blocks * loop.WORDS)
    table = source[_WORD : _WORD + blocks * loop.TABLE_ENTRY]
    body, escapes = source[start:end].view(np.uint64), source[end : end + num_escapes]
    if not loop.decode(table, body, escapes, size, words, _room.words("block", loop.SCRATCH_WORDS)):
        return False
    _complete(out, words, source[end + num_escapes :])
    return True


def _encode_max(element: Element, raw: memoryview) -> memoryview | None:
    """The bytes without the exponent, then the end of the chunk, then one frame of the bytes with it. Elements of a byte are all frame."""
    size = _SIZES.get(element)
    if size is None:
        return memoryview(_room.compressor.compress(raw))
    loop = codec_loop()
    blocks = len(raw) // (loop.WORDS * _WORD)
    if blocks == 0:
        return None
    words, tail = _blocks(raw, blocks)
    num_tops = words.size // size
    num_rest = words.size - num_tops
    stored = _room.words("encoded", words.size + -(-tail.size // _WORD))
    tops = _room.words("tops", num_tops)
    loop.split(words, size, stored[:num_rest], tops)
    frame = _room.compressor.compress(tops.view(np.uint8).data)
    if len(frame) >= num_tops * _WORD:
        return None
    whole = stored.view(np.uint8)
    start = num_rest * _WORD
    whole[start : start + tail.size] = tail
    whole[start + tail.size : start + tail.size + len(frame)] = np.frombuffer(frame, np.uint8)
    return whole.data[: start + tail.size + len(frame)]


def _decode_max(element: Element, encoded: memoryview, out: memoryview) -> bool:
    size = _SIZES.get(element)
    if size is None:
        whole = _unframed(encoded, len(out))
        if whole is not None:
            out[:] = whole
        return whole is not None
    loop = codec_loop()
    blocks = len(out) // (loop.WORDS * _WORD)
    num_words = blocks * loop.WORDS
    num_tops = num_words // size
    start = (num_words - num_tops) * _WORD
    tail = len(out) - num_words * _WORD
    if blocks == 0 or len(encoded) < start + tail:
        return False
    frame = _unframed(encoded[start + tail :], num_tops * _WORD)
    if frame is None:
        return False
    source, words = _aligned(encoded), _words_of(out, num_words)
    loop.join(source[:start].view(np.uint64), np.frombuffer(frame, np.uint64), size, words)
    _complete(out, words, source[start : start + tail])
    return True


def _unframed(frame: memoryview, num_bytes: int) -> bytes | None:
    """What a frame of Zstandard holds if that are num_bytes, else None. The size is asked first: a forged one may be anything."""
    zstandard = _zstandard()
    try:
        if zstandard.frame_content_size(frame) != num_bytes:
            return None
        whole: bytes = _room.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError:
        return None
    return whole if len(whole) == num_bytes else None


def _blocks(raw: memoryview, blocks: int) -> tuple[Words, Bytes]:
    """The words of whole blocks, and the bytes after them."""
    loop = codec_loop()
    source = _aligned(raw)
    end = blocks * loop.WORDS * _WORD
    return source[:end].view(np.uint64), source[end:]


def _words_of(out: memoryview, num_words: int) -> Words:
    """Where to decode the words of whole blocks: the beginning of out, or room of this thread if that is not aligned."""
    target = np.frombuffer(out, np.uint8)
    return target[: num_words * _WORD].view(np.uint64) if _is_aligned(target) else _room.words("raw", num_words)


def _complete(out: memoryview, words: Words, tail: Bytes) -> None:
    """Bring what was decoded into out, unless it is there, and the bytes after it."""
    target = np.frombuffer(out, np.uint8)
    if not _is_aligned(target):
        target[: words.nbytes] = words.view(np.uint8)
    target[words.nbytes :] = tail


def _aligned(data: memoryview) -> Bytes:
    """The bytes, copied only if they do not begin at a multiple of eight."""
    found = np.frombuffer(data, np.uint8)
    if _is_aligned(found):
        return found
    room = _room.words("aligned", -(-found.size // _WORD)).view(np.uint8)[: found.size]
    room[:] = found
    return room


def _is_aligned(data: Bytes) -> bool:
    return data.ctypes.data % _WORD == 0
