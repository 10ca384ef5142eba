from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.cache.keys import ChunkKey
from lmc.cache.tiers import format as chunk_format
from lmc.cache.tiers.codec import COMPRESS, ELEMENTS
from lmc.cache.tiers.format import FOOTER_BYTES, ChunkFooter, Coding, TierScope, decode, encode
from lmc.errors import ConfigError, Corrupt
from tests.contracts.tier import SCOPE, key, payload

CODING = Coding("lossless", "bf16", 60_000, 0x99AABBCCDDEEFF00)
FOOTER = ChunkFooter("0123456789abcdef", 3, "vllm-16t-18432b", key(1), 40_000, 0x1122334455667788, key(2), CODING)

footers = st.builds(
    ChunkFooter,
    namespace=st.text("0123456789abcdef", min_size=1, max_size=16),
    rank=st.integers(0, 2**32 - 1),
    layout=st.text(max_size=200),
    key=st.binary(min_size=32, max_size=32).map(ChunkKey),
    payload_bytes=st.integers(0, 2**64 - 1),
    checksum=st.integers(0, 2**64 - 1),
    parent=st.none() | st.binary(min_size=32, max_size=32).filter(any).map(ChunkKey),
    coding=st.none()
    | st.builds(
        Coding,
        st.sampled_from(COMPRESS[1:]),
        st.sampled_from(ELEMENTS),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**64 - 1),
    ),
)


@given(footers)
def test_decode_reverses_encode(footer: ChunkFooter) -> None:
    page = encode(footer)
    assert len(page) == FOOTER_BYTES
    assert decode(page) == footer


def test_the_format_is_the_one_of_version_4() -> None:
    """Chunks on disks and in stores out there end with these bytes; another form needs another version."""
    digest = hashlib.sha256(encode(FOOTER)).hexdigest()
    assert digest == "9f1a0008bacf8609c938956ec733d552590cc2ec8e57518f53804d5bd0902b21"
    assert encode(FOOTER)[:10] == b"LMCCHUNK\x04\x00"


def test_a_flipped_bit_anywhere_in_the_footer_is_found() -> None:
    page = bytearray(encode(FOOTER))
    for position in range(FOOTER_BYTES):
        bit = 1 << position % 8
        page[position] ^= bit
        with pytest.raises(Corrupt):
            decode(page)
        page[position] ^= bit
    assert decode(page) == FOOTER


def test_a_code_of_a_later_lmc_is_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(chunk_format, "COMPRESS", ("none", "a", "b", "lossless"))
        page = encode(FOOTER)
    with pytest.raises(Corrupt, match=r"does not know \(code 3, element 1\)"):
        decode(page)


@given(st.binary(max_size=FOOTER_BYTES + 10))
def test_garbage_is_corrupt(raw: bytes) -> None:
    with pytest.raises(Corrupt):
        decode(raw)


@given(st.binary(min_size=FOOTER_BYTES - 10, max_size=FOOTER_BYTES - 10))
def test_garbage_behind_magic_and_version_is_corrupt(rest: bytes) -> None:
    with pytest.raises(Corrupt, match="checksum"):
        decode(encode(FOOTER)[:10] + rest)


def test_another_version_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(chunk_format, "VERSION", 1)
        page = encode(FOOTER)
    with pytest.raises(Corrupt, match="version 1; this lmc reads version 4"):
        decode(page)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (TierScope("another", 0, SCOPE.layout, SCOPE.chunk_bytes), "another namespace$"),
        (TierScope(SCOPE.namespace, 1, SCOPE.layout, SCOPE.chunk_bytes), "another rank$"),
        (TierScope(SCOPE.namespace, 0, "another", SCOPE.chunk_bytes), "another layout$"),
        (TierScope(SCOPE.namespace, 1, SCOPE.layout, 1), "another rank and size$"),
    ],
)
def test_verify_says_what_differs(other: TierScope, said: str) -> None:
    digest = chunk_format.checksum(payload(1))
    sealed = memoryview(SCOPE.seal(key(1), digest, None, SCOPE.chunk_bytes, None))
    SCOPE.verify(key(1), sealed, digest, SCOPE.chunk_bytes, SCOPE.chunk_bytes)
    with pytest.raises(Corrupt, match=said):
        other.verify(key(1), sealed, digest, other.chunk_bytes, other.chunk_bytes)
    with pytest.raises(Corrupt, match=r"another key$"):
        SCOPE.verify(key(2), sealed, digest, SCOPE.chunk_bytes, SCOPE.chunk_bytes)
    with pytest.raises(Corrupt, match=r"payload does not match its checksum$"):
        SCOPE.verify(key(1), sealed, digest ^ 1, SCOPE.chunk_bytes, SCOPE.chunk_bytes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"namespace": "a/b"},
        {"namespace": ""},
        {"rank": -1},
        {"chunk_bytes": 0},
        {"layout": "x" * 5000},
    ],
)
def test_an_impossible_scope_is_refused(wrong: dict[str, object]) -> None:
    fields = {"namespace": "abc", "rank": 0, "layout": "l", "chunk_bytes": 1}
    with pytest.raises(ConfigError):
        TierScope(**(fields | wrong))  # type: ignore[arg-type]
