"""The compiled inner loop of a load from the page cache: each piece is read and hashed before it leaves the CPU's second cache.

Between two calls of the xxhash library a thread of Python would have to take the GIL and run code that the copy has pushed out of the
caches, so small pieces would cost more than they win; and compiled code cannot call that library. So XXH3-64 is written here once more, for
payloads of more than 240 bytes, after the algorithm's specification (Yann Collet, github.com/Cyan4973/xxHash, doc/xxhash_spec.md).
Importing this imports Numba; the loop is compiled once per machine and kept on disk.
"""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils, typing
from numba.extending import intrinsic

from lmc.compiled import compiled

# Bytes of a payload that is hashed here. XXH3 treats shorter ones in other ways, and reads numbers as little-endian.
SHORTEST = 241 if sys.byteorder == "little" else sys.maxsize
PIECE = 1 << 19  # with the same piece of the file it fits the second cache, which is 1 MiB or more in servers

_CACHESTAT = 451  # the system call's number on every architecture

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_STRIPE = 64  # bytes that are mixed into the eight accumulators at once
_STRIPES = (len(_SECRET) - _STRIPE) // 8  # of a block; each uses the secret from eight bytes further on
_BLOCK = _STRIPES * _STRIPE

_LOW = 0xFFFFFFFF
_PRIME32_1 = 0x9E3779B1
_PRIME64_1 = 0x9E3779B185EBCA87
_PRIME_MX1 = 0x165667919E3779F9


def _words(start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(struct.unpack_from(f"<{count}Q", _SECRET, start), np.uint64)


_KEYS = _words(0, len(_SECRET) // 8)
_LAST_STRIPE_KEYS = _words(len(_SECRET) - _STRIPE - 7, 8)
_MERGE_KEYS = _words(11, 8)
_START = np.array(
    [
        0xC2B2AE3D,
        _PRIME64_1,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x85EBCA77,
        0x27D4EB2F165667C5,
        _PRIME32_1,
    ],
    np.uint64,
)

_word = ir.IntType(64)
_vector = ir.VectorType(_word, 8)
_uint64 = types.uint64
_pread = types.ExternalFunction(
    "pread", typing.signature(types.int64, types.int32, types.uintp, types.uintp, types.int64)
)
_syscall = types.ExternalFunction(
    "syscall", typing.signature(types.int64, types.int64, types.int64, types.uintp, types.uintp, types.int64)
)

# Numba gives these functions their types, so they have none for mypy.


def _constant(values: Iterable[int]) -> Any:
    return ir.Constant(_vector, [int(value) for value in values])


def _each(value: int) -> Any:
    return _constant([value] * 8)


def _load(builder: Any, address: Any, alignment: int = 1) -> Any:
    return builder.load(builder.inttoptr(address, _vector.as_pointer()), align=alignment)


def _add_stripe(builder: Any, words: Any, keys: Any, products: Any, sums: Any) -> tuple[Any, Any]:
    """(products, sums) with one more stripe. Each word of sums belongs to the accumulator beside its own; see _accumulated."""
    keyed = builder.xor(words, keys)
    product = builder.mul(builder.and_(keyed, _each(_LOW)), builder.lshr(keyed, _each(32)))
    return builder.add(products, product), builder.add(sums, words)


def _accumulated(builder: Any, products: Any, sums: Any) -> Any:
    """Additions commute, so one exchange of neighbours does for all stripes."""
    neighbours = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])
    return builder.add(products, builder.shuffle_vector(sums, _each(0), neighbours))


@intrinsic
def _mix_blocks(typing_context, accumulators, data, count):  # type: ignore[no-untyped-def]
    """Mix count blocks at the address data, of any alignment, into the eight words at accumulators."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        accumulators, data, count = arguments
        total = cgutils.alloca_once(builder, _vector)
        builder.store(_load(builder, accumulators, 8), total)
        end = builder.mul(count, ir.Constant(_word, _BLOCK))
        with cgutils.for_range_slice(builder, ir.Constant(_word, 0), end, ir.Constant(_word, _BLOCK)) as (start, _):
            products, sums = builder.load(total), _each(0)
            for stripe in range(_STRIPES):
                words = _load(builder, builder.add(builder.add(data, start), ir.Constant(_word, stripe * _STRIPE)))
                products, sums = _add_stripe(builder, words, _constant(_KEYS[stripe : stripe + 8]), products, sums)
            mixed = _accumulated(builder, products, sums)
            mixed = builder.xor(builder.xor(mixed, builder.lshr(mixed, _each(47))), _constant(_KEYS[_STRIPES:]))
            builder.store(builder.mul(mixed, _each(_PRIME32_1)), total)
        builder.store(builder.load(total), builder.inttoptr(accumulators, _vector.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(_uint64, _uint64, _uint64), generate


@intrinsic
def _mix_stripe(typing_context, accumulators, data, keys):  # type: ignore[no-untyped-def]
    """Mix one stripe, with the eight keys at the address keys."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        accumulators, data, keys = arguments
        before, words = _load(builder, accumulators, 8), _load(builder, data)
        mixed = _accumulated(builder, *_add_stripe(builder, words, _load(builder, keys, 8), before, _each(0)))
        builder.store(mixed, builder.inttoptr(accumulators, _vector.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(_uint64, _uint64, _uint64), generate


@compiled()
def _folded_product(first, second):  # type: ignore[no-untyped-def]
    """The two halves of the 128-bit product, xored."""
    low, half = _uint64(_LOW), _uint64(32)
    first_low, first_high, second_low, second_high = first & low, first >> half, second & low, second >> half
    lowest = first_low * second_low
    mixed = first_high * second_low
    cross = (lowest >> half) + (mixed & low) + first_low * second_high
    upper = (mixed >> half) + (cross >> half) + first_high * second_high
    return upper ^ ((cross << half) | (lowest & low))


@compiled()
def _digest(accumulators, address, size, mixed):  # type: ignore[no-untyped-def]
    """XXH3-64 of size bytes at address, of which `mixed`, whole blocks but never all, are in the accumulators."""
    into, keys = _uint64(accumulators.ctypes.data), _uint64(_KEYS.ctypes.data)
    blocks = (size - mixed - 1) // _BLOCK
    _mix_blocks(into, _uint64(address + mixed), _uint64(blocks))
    mixed += blocks * _BLOCK
    for stripe in range((size - mixed - 1) // _STRIPE):
        _mix_stripe(into, _uint64(address + mixed + stripe * _STRIPE), keys + _uint64(8 * stripe))
    _mix_stripe(into, _uint64(address + size - _STRIPE), _uint64(_LAST_STRIPE_KEYS.ctypes.data))
    digest = _uint64(size) * _uint64(_PRIME64_1)
    for pair in range(4):
        digest += _folded_product(
            accumulators[2 * pair] ^ _MERGE_KEYS[2 * pair], accumulators[2 * pair + 1] ^ _MERGE_KEYS[2 * pair + 1]
        )
    digest = (digest ^ (digest >> _uint64(37))) * _uint64(_PRIME_MX1)
    return digest ^ (digest >> _uint64(32))


@compiled("boolean(int32, int64, int64)")
def _is_cached(fd, start, length):  # type: ignore[no-untyped-def]
    """Whether these bytes of a file are in the page cache, or the kernel does not say (before Linux 6.5)."""
    area = np.array([start, length], np.uint64)
    pages = np.zeros(5, np.uint64)  # cached, dirty, in writeback, evicted, recently evicted
    failed = _syscall(_CACHESTAT, fd, area.ctypes.data, pages.ctypes.data, 0)
    return failed != 0 or pages[0] * _uint64(mmap.PAGESIZE) >= _uint64(length)


@compiled("Tuple((int64, uint64, boolean))(int32, uint8[::1], uint8[::1], int64, int64)")
def read_and_hash(fd, payload, rest, edge, piece):  # type: ignore[no-untyped-def]
    """Read a file from its start into payload, then into rest, until both are full, the file ends or a read fails.

    edge: bytes at either end of the payload that must be in the page cache, or the kernel not say. Returns how many bytes were read or -1
    when the edges are not cached, XXH3-64 of payload if that is full and has SHORTEST bytes, and whether a read failed.
    """
    size, total = len(payload), len(payload) + len(rest)
    edge = min(edge, size)
    if not (_is_cached(fd, 0, edge) and _is_cached(fd, size - edge, edge)):
        return -1, _uint64(0), False
    accumulators = _START.copy()
    address = payload.ctypes.data
    mixed = position = 0
    failed = False
    while position < total:
        if position < size:
            count = _pread(fd, address + position, min(piece, size - position), position)
        else:
            count = _pread(fd, rest.ctypes.data + position - size, total - position, position)
        if count <= 0:
            failed = count < 0
            break
        position += count
        if mixed < size:
            blocks = (min(position, size) - mixed - 1) // _BLOCK
            _mix_blocks(_uint64(accumulators.ctypes.data), _uint64(address + mixed), _uint64(blocks))
            mixed += blocks * _BLOCK
    hashed = position >= size and size >= SHORTEST
    digest = _digest(accumulators, address, size, mixed) if hashed else _uint64(0)
    return position, digest, failed
