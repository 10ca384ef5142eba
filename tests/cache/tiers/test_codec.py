"""The lossless codec gives back every bit, of any element, and never more than a miss for what was damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.keys import Element
from lmc.cache.sections import Compress
from lmc.cache.tiers.codec import COMPRESS, ELEMENTS, decode, encode
from lmc.errors import Corrupt

CODES: tuple[Compress, ...] = ("lossless", "lossless-max")
BLOCK = 8192  # bytes that are coded together
GUARD = 64
_WIDTHS: dict[Element, npt.DTypeLike] = {"bf16": np.uint16, "fp16": np.uint16, "fp32": np.uint32, "fp8": np.uint8}


def made(element: Element, num_bytes: int, seed: int, scale: float = 1.0) -> bytes:
    """Numbers as they come in KV, in the bits of element."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(num_bytes // 4 + 4) * scale).astype(np.float32)
    if element == "fp16":
        with np.errstate(over="ignore"):
            raw = values.astype(np.float16).tobytes() * 2
    elif element in ("bf16", "fp8"):  # of fp8 an exponent and no mantissa to speak of
        raw = (values.view(np.uint32) >> (16 if element == "bf16" else 24)).astype(_WIDTHS[element]).tobytes() * 4
    else:
        raw = values.tobytes()
    return raw[:num_bytes]


def there_and_back(compress: Compress, element: Element, raw: bytes, offset: int = 0) -> bool:
    """Whether it was shortened; either way nothing is lost."""
    room = bytearray(offset) + raw
    encoded = encode(compress, element, memoryview(room)[offset:])
    if encoded is None:
        return False
    assert len(encoded) < len(raw)
    stored = memoryview(bytes(offset) + bytes(encoded))[offset:]
    guarded = bytearray(b"\xa5" * (offset + len(raw) + GUARD))
    decode(compress, element, stored, memoryview(guarded)[offset : offset + len(raw)])
    assert guarded[offset : offset + len(raw)] == raw
    assert guarded[:offset] == b"\xa5" * offset and guarded[offset + len(raw) :] == b"\xa5" * GUARD
    return True


@pytest.mark.parametrize(("compress", "element"), product(COMPRESS, ELEMENTS))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_bit_comes_back(compress: Compress, element: Element, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 5 * BLOCK))
    seed = data.draw(st.integers(0, 2**32))
    raw = bytearray(made(element, size, seed, data.draw(st.sampled_from([1e-42, 1e-6, 1.0, 1e30]))))
    rng = np.random.default_rng(seed)
    for _ in range(data.draw(st.integers(0, 4))):  # runs of anything else: noise, zeros, NaN, infinities, denormals
        start = data.draw(st.integers(0, max(size - 1, 0)))
        length = data.draw(st.integers(0, size - start))
        kind = data.draw(st.sampled_from(["noise", b"\0", b"\xff", b"\x80\x7f", b"\x80\xff", b"\xc1\x7f", b"\x01\0"]))
        run = rng.bytes(length) if isinstance(kind, str) else (kind * length)[:length]
        raw[start : start + length] = run
    there_and_back(compress, element, bytes(raw), data.draw(st.sampled_from([0, 0, 1, 4])))


@pytest.mark.parametrize("element", ["bf16", "fp16"])
@pytest.mark.parametrize("compress", CODES)
def test_every_pattern_of_16_bits_comes_back(compress: Compress, element: Element) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    usual = np.frombuffer(made(element, 1 << 20, 1), np.uint16)
    there_and_back(compress, element, patterns.tobytes())
    assert there_and_back(compress, element, np.concatenate([usual, patterns]).tobytes())


@pytest.mark.parametrize(("compress", "element", "most"), [
    ("lossless", "bf16", 0.76), ("lossless", "fp16", 0.9), ("lossless", "fp32", 0.88),
    ("lossless-max", "bf16", 0.68), ("lossless-max", "fp16", 0.87), ("lossless-max", "fp32", 0.84), ("lossless-max", "fp8", 0.5),
])  # fmt: skip
def test_it_is_as_short_as_the_exponents_allow(compress: Compress, element: Element, most: float) -> None:
    raw = memoryview(made(element, 1 << 20, 2))
    encoded = encode(compress, element, raw)
    assert encoded is not None and len(encoded) <= most * len(raw)


def test_what_does_not_shrink_has_no_encoded_form() -> None:
    noise = np.random.default_rng(3).bytes(8 * BLOCK)
    for compress, element in product(COMPRESS, ELEMENTS):
        assert encode(compress, element, memoryview(noise)) is None
    for size in (0, 1, BLOCK - 1):
        assert encode("lossless", "bf16", memoryview(made("bf16", size, 4))) is None


def test_a_code_that_does_not_exist_is_refused() -> None:
    out = memoryview(bytearray(BLOCK))
    for compress, element in (
        ("none", "bf16"),
        ("lossless", "opaque"),
        ("lossless", "fp8"),
        ("lossless-max", "opaque"),
    ):
        with pytest.raises(Corrupt, match="does not exist"):
            decode(compress, element, memoryview(bytes(100)), out)  # type: ignore[arg-type]


def damage(rng: np.random.Generator, good: bytes) -> bytes:
    """Flipped bits, other bytes, a cut, an addition, or parts that changed places; half of them where lengths and widths are."""
    bad = bytearray(good)
    place = int(rng.integers(0, 64 if rng.random() < 0.5 else len(bad)))
    match int(rng.integers(0, 5)):
        case 0:
            bad[place] ^= 1 << int(rng.integers(0, 8))
        case 1:
            bad[place : place + 8] = rng.bytes(8)
        case 2:
            del bad[place:]
        case 3:
            bad[place:place] = rng.bytes(int(rng.integers(1, 64)))
        case _:
            bad = bad[place:] + bad[:place]
    return bytes(bad)


def fuzz(mutations: int) -> int:
    """Returns how many were refused. What is not refused fills the slot and nothing else; its checksum will tell."""
    rng = np.random.default_rng(5)
    cases = [(c, e, made(e, 2 * BLOCK + 100, 6)) for c, e in product(CODES, ELEMENTS) if e != "opaque"]
    good = [(c, e, len(raw), bytes(encoded)) for c, e, raw in cases if (encoded := encode(c, e, memoryview(raw)))]
    assert len(good) == 7
    refused = 0
    for number in range(mutations):
        compress, element, size, stored = good[number % len(good)]
        guarded = bytearray(b"\xa5" * (size + 2 * GUARD))
        try:
            decode(compress, element, memoryview(damage(rng, stored)), memoryview(guarded)[GUARD : GUARD + size])
        except Corrupt:
            refused += 1
        assert guarded[:GUARD] == guarded[GUARD + size :] == b"\xa5" * GUARD
    return refused


def test_10_000_damaged_chunks_are_refused_or_left_to_the_checksum() -> None:
    assert fuzz(10_000) > 5_000


def test_no_damaged_chunk_makes_compiled_code_leave_its_arrays(tmp_path: Path) -> None:
    """Numba checks every index of compiled code when it is told to: an index that is out of bounds would raise IndexError."""
    program = "from tests.cache.tiers.test_codec import fuzz; assert fuzz(3_000) > 1_000"
    checked = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=checked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
