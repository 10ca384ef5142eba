"""The compiled XXH3-64 beside the xxhash library's, over files that are read in pieces of any size."""

from __future__ import annotations

import os
import random
import tempfile

import numpy as np
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.tiers.read_loop import PIECE, SHORTEST, read_and_hash

sizes = st.one_of(
    st.integers(SHORTEST, 5_000),
    st.integers(1, 40).flatmap(lambda blocks: st.integers(1024 * blocks - 70, 1024 * blocks + 70)),
    st.integers(100_000, 3_000_000),
)


def read(content: bytes, size: int, rest: int, piece: int) -> tuple[tuple[int, int, bool], bytes, bytes]:
    payload, behind = np.zeros(size, np.uint8), np.zeros(rest, np.uint8)
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        found = read_and_hash(file.fileno(), payload, behind, 0, piece)
    return found, payload.tobytes(), behind.tobytes()


@settings(deadline=None, max_examples=200)
@given(sizes, st.integers(0, 5_000), st.sampled_from([64, 1_000, 1_024, 4_096, 100_001, PIECE]), st.integers(0, 2**32))
def test_it_reads_and_hashes(size: int, rest: int, piece: int, seed: int) -> None:
    piece = max(piece, size // 1_000)
    content = random.Random(seed).randbytes(size + rest)
    assert read(content, size, rest, piece) == (
        (size + rest, xxhash.xxh3_64_intdigest(content[:size]), False),
        content[:size],
        content[size:],
    )


@settings(deadline=None)
@given(st.integers(1, 3_000), st.integers(0, 3_000), st.data())
def test_a_file_of_another_size_is_read_as_far_as_it_goes(size: int, rest: int, data: st.DataObject) -> None:
    stored = data.draw(st.integers(0, size + rest + 100))
    content = random.Random(stored).randbytes(stored)
    (position, digest, failed), payload, behind = read(content, size, rest, 1_000)
    assert (position, failed) == (min(stored, size + rest), False)
    assert (payload + behind)[:position] == content[:position]
    if SHORTEST <= size <= stored:
        assert digest == xxhash.xxh3_64_intdigest(content[:size])


def test_words_whose_product_has_every_carry_are_hashed_right() -> None:
    for byte in (0x00, 0x01, 0x7F, 0x80, 0xFF):
        for size in (SHORTEST, 1_024, 1_025, 2_047, 65_536):
            content = bytes([byte]) * size
            assert read(content, size, 0, PIECE)[0][1] == xxhash.xxh3_64_intdigest(content)


def test_a_failed_read_is_told_from_the_end_of_a_file() -> None:
    reader, writer = os.pipe()
    position, _, failed = read_and_hash(reader, np.zeros(300, np.uint8), np.zeros(1, np.uint8), 0, PIECE)
    assert (position, failed) == (0, True)
    os.close(reader)
    os.close(writer)
