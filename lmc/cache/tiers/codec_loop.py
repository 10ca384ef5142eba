"""The compiled inner loops of the lossless codec: 64-bit words at a time, in a shape that the compiler turns into vector instructions.

A block of the codec is WORDS words of elements. split() rotates each element's sign to its low end, so that the exponent fills the top
byte; the top bytes go into one plane, the other bytes into another. encode() writes a top byte as a code of few bits, counted from a base
of its block; what does not fit is written as the highest code and follows as a whole byte. Which element goes where is a fixed permutation,
chosen so that no byte has to move inside its word by more than a shift.

All loops index only what their caller's arithmetic has measured: decode() adds up what its table says before it touches anything else.
Importing this imports Numba; the loops are compiled once per machine and kept on disk.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from lmc.compiled import compiled

WORDS = 1024  # of a block
TABLE_ENTRY = 4  # bytes of a block in the table: width, base, and twice a byte of the number of escapes
AS_IS = 8  # the width of a block whose top bytes are stored as they are
SCRATCH_WORDS = 2 * WORDS  # top bytes, codes, marks
_STEP = 32  # for a sample of 270 bytes. The step is less by one and so odd, so that all channels of a head are seen

# Numba gives these functions their types, so they have none for mypy.

_u = np.uint64
_ONES = _u(0x0101010101010101)
_LOW7 = _u(0x7F7F7F7F7F7F7F7F)
_TOP1 = _u(0x8080808080808080)
_EVEN = _u(0x00FF00FF00FF00FF)
_ODD = _u(0xFF00FF00FF00FF00)
_BIT16 = _u(0x0001000100010001)
_NOT_BIT16 = _u(0xFFFEFFFEFFFEFFFE)
_BIT32 = _u(0x0000000100000001)
_NOT_BIT32 = _u(0xFFFFFFFEFFFFFFFE)
_BYTE32 = _u(0x000000FF000000FF)
_TOP32 = _u(0xFF000000FF000000)
_REST32 = _u(0x00FFFFFF00FFFFFF)
_0, _1, _2, _3, _4, _6, _7, _8 = (_u(number) for number in (0, 1, 2, 3, 4, 6, 7, 8))
_15, _16, _24, _31, _63, _255, _256 = (_u(number) for number in (15, 16, 24, 31, 63, 255, 256))

_READ_WORDS = types.Array(types.uint64, 1, "C", readonly=True)
_READ_BYTES = types.Array(types.uint8, 1, "C", readonly=True)
_ALL_WORDS = types.Array(types.uint64, 1, "C")
_ALL_BYTES = types.Array(types.uint8, 1, "C")


@intrinsic
def _lowest_bit(typing_context, word):  # type: ignore[no-untyped-def]
    """The number of the lowest bit of word that is not 0; there must be one."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@compiled()
def _split16(words, rest, tops):  # type: ignore[no-untyped-def]
    quarter = WORDS // 4
    first, second = words[:quarter], words[quarter : 2 * quarter]
    third, fourth = words[2 * quarter : 3 * quarter], words[3 * quarter : 4 * quarter]
    rest_low, rest_high = rest[:quarter], rest[quarter : 2 * quarter]
    top_low, top_high = tops[:quarter], tops[quarter : 2 * quarter]
    for i in range(quarter):
        a = ((first[i] << _1) & _NOT_BIT16) | ((first[i] >> _15) & _BIT16)
        b = ((second[i] << _1) & _NOT_BIT16) | ((second[i] >> _15) & _BIT16)
        c = ((third[i] << _1) & _NOT_BIT16) | ((third[i] >> _15) & _BIT16)
        d = ((fourth[i] << _1) & _NOT_BIT16) | ((fourth[i] >> _15) & _BIT16)
        rest_low[i] = (a & _EVEN) | ((b & _EVEN) << _8)
        rest_high[i] = (c & _EVEN) | ((d & _EVEN) << _8)
        top_low[i] = ((a >> _8) & _EVEN) | (b & _ODD)
        top_high[i] = ((c >> _8) & _EVEN) | (d & _ODD)


@compiled()
def _join16(rest, tops, words):  # type: ignore[no-untyped-def]
    quarter = WORDS // 4
    first, second = words[:quarter], words[quarter : 2 * quarter]
    third, fourth = words[2 * quarter : 3 * quarter], words[3 * quarter : 4 * quarter]
    rest_low, rest_high = rest[:quarter], rest[quarter : 2 * quarter]
    top_low, top_high = tops[:quarter], tops[quarter : 2 * quarter]
    for i in range(quarter):
        a = (rest_low[i] & _EVEN) | ((top_low[i] & _EVEN) << _8)
        b = ((rest_low[i] >> _8) & _EVEN) | (top_low[i] & _ODD)
        c = (rest_high[i] & _EVEN) | ((top_high[i] & _EVEN) << _8)
        d = ((rest_high[i] >> _8) & _EVEN) | (top_high[i] & _ODD)
        first[i] = ((a & _NOT_BIT16) >> _1) | ((a & _BIT16) << _15)
        second[i] = ((b & _NOT_BIT16) >> _1) | ((b & _BIT16) << _15)
        third[i] = ((c & _NOT_BIT16) >> _1) | ((c & _BIT16) << _15)
        fourth[i] = ((d & _NOT_BIT16) >> _1) | ((d & _BIT16) << _15)


@compiled()
def _split32(words, rest, tops):  # type: ignore[no-untyped-def]
    quarter = WORDS // 4
    first, second = words[:quarter], words[quarter : 2 * quarter]
    third, fourth = words[2 * quarter : 3 * quarter], words[3 * quarter : 4 * quarter]
    rest_a, rest_b, rest_c = rest[:quarter], rest[quarter : 2 * quarter], rest[2 * quarter : 3 * quarter]
    for i in range(quarter):
        a = ((first[i] << _1) & _NOT_BIT32) | ((first[i] >> _31) & _BIT32)
        b = ((second[i] << _1) & _NOT_BIT32) | ((second[i] >> _31) & _BIT32)
        c = ((third[i] << _1) & _NOT_BIT32) | ((third[i] >> _31) & _BIT32)
        d = ((fourth[i] << _1) & _NOT_BIT32) | ((fourth[i] >> _31) & _BIT32)
        tops[i] = (
            ((a >> _24) & _BYTE32) | (((b >> _24) & _BYTE32) << _8) | (((c >> _24) & _BYTE32) << _16) | (d & _TOP32)
        )
        rest_a[i] = (a & _REST32) | ((d & _BYTE32) << _24)
        rest_b[i] = (b & _REST32) | (((d >> _8) & _BYTE32) << _24)
        rest_c[i] = (c & _REST32) | (((d >> _16) & _BYTE32) << _24)


@compiled()
def _join32(rest, tops, words):  # type: ignore[no-untyped-def]
    quarter = WORDS // 4
    first, second = words[:quarter], words[quarter : 2 * quarter]
    third, fourth = words[2 * quarter : 3 * quarter], words[3 * quarter : 4 * quarter]
    rest_a, rest_b, rest_c = rest[:quarter], rest[quarter : 2 * quarter], rest[2 * quarter : 3 * quarter]
    for i in range(quarter):
        a = (rest_a[i] & _REST32) | ((tops[i] & _BYTE32) << _24)
        b = (rest_b[i] & _REST32) | (((tops[i] >> _8) & _BYTE32) << _24)
        c = (rest_c[i] & _REST32) | (((tops[i] >> _16) & _BYTE32) << _24)
        d = (
            ((rest_a[i] >> _24) & _BYTE32)
            | (((rest_b[i] >> _24) & _BYTE32) << _8)
            | (((rest_c[i] >> _24) & _BYTE32) << _16)
            | (tops[i] & _TOP32)
        )
        first[i] = ((a & _NOT_BIT32) >> _1) | ((a & _BIT32) << _31)
        second[i] = ((b & _NOT_BIT32) >> _1) | ((b & _BIT32) << _31)
        third[i] = ((c & _NOT_BIT32) >> _1) | ((c & _BIT32) << _31)
        fourth[i] = ((d & _NOT_BIT32) >> _1) | ((d & _BIT32) << _31)


@compiled()
def _split(size, words, rest, tops):  # type: ignore[no-untyped-def]
    if size == 4:
        _split32(words, rest, tops)
    else:
        _split16(words, rest, tops)


@compiled()
def _join(size, rest, tops, words):  # type: ignore[no-untyped-def]
    if size == 4:
        _join32(rest, tops, words)
    else:
        _join16(rest, tops, words)


@compiled()
def _choose(tops, widths, below):  # type: ignore[no-untyped-def]
    """(width, base) that a sample of a block's top bytes promises to be the shortest. below: room for 257 counts."""
    for top in range(257):
        below[top] = 0
    sampled = 0
    for i in range(0, len(tops), _STEP * len(tops) // WORDS - 1):
        word = tops[i]
        for _ in range(8):
            below[np.int64(word & _255) + 1] += 1
            word >>= _8
        sampled += 8
    for top in range(256):
        below[top + 1] += below[top]
    best_width, best_base, best_bits = AS_IS, 0, sampled * AS_IS
    for width in widths:
        held = (1 << width) - 1  # the highest code says that a whole byte follows
        most = 0
        upper, lower = below[held:], below[: 257 - held]
        for base in range(len(lower)):
            most = max(most, upper[base] - lower[base])
        bits = sampled * width + (sampled - most) * 8
        if bits < best_bits:
            best_width, best_bits = width, bits
            for base in range(len(lower)):
                if upper[base] - lower[base] == most:
                    best_base = base
                    break
    return best_width, best_base


@compiled()
def _to_codes(tops, codes, width, base):  # type: ignore[no-untyped-def]
    """A code in each byte of codes. Returns whether any is the highest one."""
    shift = _u(width)
    highest = ((_1 << shift) - _1) * _ONES
    above = (_255 >> shift) * _ONES
    offset = ((_256 - _u(base)) & _255) * _ONES
    low_offset = offset & _LOW7
    seen = _0
    for i in range(len(tops)):
        distance = ((tops[i] & _LOW7) + low_offset) ^ ((tops[i] ^ offset) & _TOP1)
        beyond = ((((distance >> shift) & above) + _LOW7) >> _7) & _ONES
        code = (distance & highest) | ((beyond << shift) - beyond)
        codes[i] = code
        seen |= code + _ONES
    return (seen >> shift) & _ONES != _0


@compiled()
def _from_codes(codes, tops, base):  # type: ignore[no-untyped-def]
    offset = _u(base) * _ONES
    low_offset = offset & _LOW7
    for i in range(len(tops)):
        tops[i] = ((codes[i] & _LOW7) + low_offset) ^ ((codes[i] ^ offset) & _TOP1)


@compiled()
def _copy(words, into):  # type: ignore[no-untyped-def]
    """An assignment of slices would bring code for its messages, which takes seconds to compile."""
    for i in range(len(words)):
        into[i] = words[i]


@compiled()
def _mark_escapes(codes, marks, width):  # type: ignore[no-untyped-def]
    """A bit for each highest code: of byte b of word k * len(marks) + i, bit 8 * b + k of marks[i]. So few words have none or many."""
    shift = _u(width)
    count = len(marks)
    for i in range(count):
        marks[i] = _0
    for k in range(8):
        eighth = codes[k * count : (k + 1) * count]
        for i in range(count):
            marks[i] |= (((eighth[i] + _ONES) >> shift) & _ONES) << _u(k)


@compiled()
def _take_escapes(marks, tops_bytes, escapes, start):  # type: ignore[no-untyped-def]
    """Append the whole byte of each mark; returns the number of escapes after them."""
    count = len(marks)
    for i in range(count):
        left = marks[i]
        while left != _0:
            bit = _lowest_bit(left)
            escapes[start] = tops_bytes[8 * ((bit & 7) * count + i) + (bit >> 3)]
            start += 1
            left &= left - _1
    return start


@compiled()
def _put_escapes(marks, tops_bytes, escapes, start, end):  # type: ignore[no-untyped-def]
    """Returns where it stopped: end, or another number when there are not as many marks as escapes."""
    count = len(marks)
    for i in range(count):
        left = marks[i]
        while left != _0:
            if start == end:
                return -1
            bit = _lowest_bit(left)
            tops_bytes[8 * ((bit & 7) * count + i) + (bit >> 3)] = escapes[start]
            start += 1
            left &= left - _1
    return start


@compiled()
def _pack(codes, packed, width):  # type: ignore[no-untyped-def]
    """Codes of 3, 4 or 6 bits, one in each byte, without the gaps."""
    if width == 4:
        half = len(codes) // 2
        first, second, into = codes[:half], codes[half : 2 * half], packed[:half]
        for i in range(half):
            into[i] = first[i] | (second[i] << _4)
    elif width == 6:
        part = len(codes) // 4
        a, b, c, d = codes[:part], codes[part : 2 * part], codes[2 * part : 3 * part], codes[3 * part : 4 * part]
        x, y, z = packed[:part], packed[part : 2 * part], packed[2 * part : 3 * part]
        for i in range(part):
            x[i] = a[i] | ((d[i] & (_3 * _ONES)) << _6)
            y[i] = b[i] | (((d[i] >> _2) & (_3 * _ONES)) << _6)
            z[i] = c[i] | (((d[i] >> _4) & (_3 * _ONES)) << _6)
    else:
        part = len(codes) // 8
        a, b, c, d = codes[:part], codes[part : 2 * part], codes[2 * part : 3 * part], codes[3 * part : 4 * part]
        rest = codes[4 * part :]
        e, f, g, h = rest[:part], rest[part : 2 * part], rest[2 * part : 3 * part], rest[3 * part : 4 * part]
        x, y, z = packed[:part], packed[part : 2 * part], packed[2 * part : 3 * part]
        for i in range(part):
            x[i] = a[i] | (b[i] << _3) | ((c[i] & (_3 * _ONES)) << _6)
            y[i] = d[i] | (e[i] << _3) | ((f[i] & (_3 * _ONES)) << _6)
            z[i] = g[i] | (h[i] << _3) | (((c[i] >> _2) & _ONES) << _6) | (((f[i] >> _2) & _ONES) << _7)


@compiled()
def _unpack(packed, codes, width):  # type: ignore[no-untyped-def]
    if width == 4:
        half = len(codes) // 2
        first, second, source = codes[:half], codes[half : 2 * half], packed[:half]
        for i in range(half):
            first[i] = source[i] & (_15 * _ONES)
            second[i] = (source[i] >> _4) & (_15 * _ONES)
    elif width == 6:
        part = len(codes) // 4
        a, b, c, d = codes[:part], codes[part : 2 * part], codes[2 * part : 3 * part], codes[3 * part : 4 * part]
        x, y, z = packed[:part], packed[part : 2 * part], packed[2 * part : 3 * part]
        for i in range(part):
            a[i] = x[i] & (_63 * _ONES)
            b[i] = y[i] & (_63 * _ONES)
            c[i] = z[i] & (_63 * _ONES)
            d[i] = (
                ((x[i] >> _6) & (_3 * _ONES))
                | (((y[i] >> _6) & (_3 * _ONES)) << _2)
                | (((z[i] >> _6) & (_3 * _ONES)) << _4)
            )
    else:
        part = len(codes) // 8
        a, b, c, d = codes[:part], codes[part : 2 * part], codes[2 * part : 3 * part], codes[3 * part : 4 * part]
        rest = codes[4 * part :]
        e, f, g, h = rest[:part], rest[part : 2 * part], rest[2 * part : 3 * part], rest[3 * part : 4 * part]
        x, y, z = packed[:part], packed[part : 2 * part], packed[2 * part : 3 * part]
        for i in range(part):
            a[i] = x[i] & (_7 * _ONES)
            b[i] = (x[i] >> _3) & (_7 * _ONES)
            c[i] = ((x[i] >> _6) & (_3 * _ONES)) | (((z[i] >> _6) & _ONES) << _2)
            d[i] = y[i] & (_7 * _ONES)
            e[i] = (y[i] >> _3) & (_7 * _ONES)
            f[i] = ((y[i] >> _6) & (_3 * _ONES)) | (((z[i] >> _7) & _ONES) << _2)
            g[i] = z[i] & (_7 * _ONES)
            h[i] = (z[i] >> _3) & (_7 * _ONES)


@compiled(types.void(_READ_WORDS, types.int64, _ALL_WORDS, _ALL_WORDS))
def split(words, size, rest, tops):  # type: ignore[no-untyped-def]
    """The planes of whole blocks of elements of 2 or 4 bytes; tops has one byte of each element, rest the others."""
    num_tops = WORDS // size
    num_rest = WORDS - num_tops
    for block in range(len(words) // WORDS):
        _split(
            size,
            words[block * WORDS : (block + 1) * WORDS],
            rest[block * num_rest : (block + 1) * num_rest],
            tops[block * num_tops : (block + 1) * num_tops],
        )


@compiled(types.void(_READ_WORDS, _READ_WORDS, types.int64, _ALL_WORDS))
def join(rest, tops, size, words):  # type: ignore[no-untyped-def]
    """What split() has taken apart."""
    num_tops = WORDS // size
    num_rest = WORDS - num_tops
    for block in range(len(words) // WORDS):
        _join(
            size,
            rest[block * num_rest : (block + 1) * num_rest],
            tops[block * num_tops : (block + 1) * num_tops],
            words[block * WORDS : (block + 1) * WORDS],
        )


@compiled(types.UniTuple(types.int64, 2)(_READ_WORDS, types.int64, _ALL_BYTES, _ALL_WORDS, _ALL_BYTES, _ALL_WORDS))
def encode(words, size, table, body, escapes, scratch):  # type: ignore[no-untyped-def]
    """Encode whole blocks of elements of 2 or 4 bytes; returns how many words of body and bytes of escapes were written.

    table has TABLE_ENTRY bytes a block, body as many words as words, escapes as many bytes as there are elements.
    """
    num_tops = WORDS // size
    num_rest = WORDS - num_tops
    tops, codes = scratch[:num_tops], scratch[num_tops : 2 * num_tops]
    marks = scratch[2 * num_tops : 2 * num_tops + num_tops // 8]
    tops_bytes = scratch.view(np.uint8)
    below = np.zeros(257, np.int32)
    widths = np.array([3, 4, 6], np.int64)
    position = end = np.int64(0)
    for block in range(len(words) // WORDS):
        rest = body[position : position + num_rest]
        _split(size, words[block * WORDS : (block + 1) * WORDS], rest, tops)
        position += num_rest
        width, base = _choose(tops, widths, below)
        start = end
        if width < AS_IS and _to_codes(tops, codes, width, base):
            _mark_escapes(codes, marks, width)
            end = _take_escapes(marks, tops_bytes, escapes, end)
        num_packed = num_tops * width // 8
        if width < AS_IS and num_packed * 8 + end - start >= num_tops * 8:  # the sample has promised too much
            width, base, end, num_packed = AS_IS, 0, start, num_tops
        packed = body[position : position + num_packed]
        if width == AS_IS:
            _copy(tops, packed)
        else:
            _pack(codes, packed, width)
        position += num_packed
        table[TABLE_ENTRY * block] = width
        table[TABLE_ENTRY * block + 1] = base
        table[TABLE_ENTRY * block + 2] = (end - start) & 255
        table[TABLE_ENTRY * block + 3] = (end - start) >> 8
    return position, end


@compiled(types.UniTuple(types.int64, 2)(_READ_BYTES, types.int64))
def measure(table, size):  # type: ignore[no-untyped-def]
    """The words of body and bytes of escapes that a table stands for; (-1, -1) when it is none."""
    num_tops = WORDS // size
    num_words = num_escapes = np.int64(0)
    for entry in range(0, len(table), TABLE_ENTRY):
        width = np.int64(table[entry])
        if width != 3 and width != 4 and width != 6 and width != AS_IS:
            return -1, -1
        num_words += WORDS - num_tops + num_tops * width // 8
        num_escapes += np.int64(table[entry + 2]) + (np.int64(table[entry + 3]) << 8)
    return num_words, num_escapes


@compiled(types.boolean(_READ_BYTES, _READ_WORDS, _READ_BYTES, types.int64, _ALL_WORDS, _ALL_WORDS))
def decode(table, body, escapes, size, words, scratch):  # type: ignore[no-untyped-def]
    """Fill words, which are whole blocks, from what encode() wrote; False when that cannot be."""
    num_words, num_escapes = measure(table, size)
    if num_words != len(body) or num_escapes != len(escapes) or len(table) // TABLE_ENTRY != len(words) // WORDS:
        return False
    num_tops = WORDS // size
    num_rest = WORDS - num_tops
    tops, codes = scratch[:num_tops], scratch[num_tops : 2 * num_tops]
    marks = scratch[2 * num_tops : 2 * num_tops + num_tops // 8]
    tops_bytes = scratch.view(np.uint8)
    position = start = np.int64(0)
    for block in range(len(words) // WORDS):
        width = np.int64(table[TABLE_ENTRY * block])
        rest = body[position : position + num_rest]
        position += num_rest
        num_packed = num_tops * width // 8
        packed = body[position : position + num_packed]
        position += num_packed
        end = start + np.int64(table[TABLE_ENTRY * block + 2]) + (np.int64(table[TABLE_ENTRY * block + 3]) << 8)
        if width == AS_IS:
            if end != start:
                return False
            _copy(packed, tops)
        else:
            _unpack(packed, codes, width)
            _from_codes(codes, tops, np.int64(table[TABLE_ENTRY * block + 1]))
            _mark_escapes(codes, marks, width)
            if _put_escapes(marks, tops_bytes, escapes, start, end) != end:
                return False
        start = end
        _join(size, rest, tops, words[block * WORDS : (block + 1) * WORDS])
    return True
