"""What every tier must do. A test module subclasses TierContract, or BoundedTierContract, and gives it a fixture `open_tier`.

open_tier(scope) opens a tier object on one medium that all objects of the same test share, as several processes would.
"""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.base import BoundedTier, Tier
from lmc.cache.tiers.format import TierScope, stored_bytes
from lmc.errors import ConfigError, Corrupt

CHUNK_BYTES = 40_000  # not a whole number of pages
SCOPE = TierScope(namespace="0123456789abcdef", rank=0, layout="layout of the tests", chunk_bytes=CHUNK_BYTES)

OTHER_SCOPES = [
    TierScope("fedcba9876543210", 0, SCOPE.layout, CHUNK_BYTES),
    TierScope(SCOPE.namespace, 1, SCOPE.layout, CHUNK_BYTES),
]
OTHER_SCOPE_NAMES = ["namespace", "rank"]
CODED = replace(SCOPE, element="bf16", compress="lossless")
CODED_MAX = replace(CODED, compress="lossless-max")
NUM_KEYS = 64  # the tests below use key(0) to key(63)
NUM_MODEL_KEYS = 6

OpenTier = Callable[[TierScope], Tier]


def key(number: int) -> ChunkKey:
    return ChunkKey(random.Random(number).randbytes(32))


def payload(number: int, size: int = CHUNK_BYTES) -> memoryview:
    return memoryview(random.Random(-number - 1).randbytes(size))


def kv_payload(number: int, size: int = CHUNK_BYTES) -> memoryview:
    """Numbers of bf16 as they come in KV, which a code shortens."""
    values = np.random.default_rng(number).standard_normal(size // 2).astype(np.float32)
    return memoryview((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def load(tier: Tier, number: int, size: int = CHUNK_BYTES) -> bytes | None:
    """What the tier holds under key(number), or None when it is absent."""
    out = memoryview(bytearray(size))
    try:
        tier.get(key(number), out)
    except KeyError:
        return None
    return bytes(out)


class TierContract:
    model_examples = 20  # fewer where a medium is slow

    @pytest.fixture
    def tier(self, open_tier: OpenTier) -> Tier:
        return open_tier(SCOPE)

    def test_get_returns_what_was_put(self, tier: Tier) -> None:
        for number in range(8):
            tier.put(key(number), payload(number))
        for number in reversed(range(8)):
            assert load(tier, number) == payload(number)

    def test_get_of_an_absent_key_raises_key_error(self, tier: Tier) -> None:
        tier.put(key(1), payload(1))
        with pytest.raises(KeyError):
            tier.get(key(2), memoryview(bytearray(CHUNK_BYTES)))

    def test_get_fills_only_the_slot(self, tier: Tier) -> None:
        tier.put(key(1), payload(1))
        slab = memoryview(bytearray(CHUNK_BYTES + 100))
        tier.get(key(1), slab[50 : 50 + CHUNK_BYTES])
        assert bytes(slab) == bytes(50) + bytes(payload(1)) + bytes(50)

    @pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 65_536, 3_000_001])
    def test_every_size_comes_back(self, open_tier: OpenTier, size: int) -> None:
        tier = open_tier(TierScope(SCOPE.namespace, 0, SCOPE.layout, size))
        tier.put(key(1), payload(1, size))
        assert load(tier, 1, size) == payload(1, size)

    @pytest.mark.parametrize("scope", [CODED, CODED_MAX], ids=["lossless", "lossless-max"])
    @pytest.mark.parametrize("auth_key", [b"", bytes(range(32))], ids=["checked", "sealed"])
    def test_a_compressed_chunk_comes_back_in_less_room(
        self, open_tier: OpenTier, scope: TierScope, auth_key: bytes
    ) -> None:
        tier = open_tier(replace(scope, auth_key=auth_key))
        for number in range(4):
            put = tier.put(key(number), kv_payload(number), key(9))
            assert put.stored_bytes < 0.9 * CHUNK_BYTES and put.codec_seconds > 0
            out = bytearray(b"\xa5" * (CHUNK_BYTES + 100))
            got = tier.get(key(number), memoryview(out)[50 : 50 + CHUNK_BYTES])
            assert out == b"\xa5" * 50 + kv_payload(number) + b"\xa5" * 50
            assert got.stored_bytes == put.stored_bytes and got.codec_seconds > 0

    def test_what_does_not_shrink_is_stored_as_it_is(self, open_tier: OpenTier) -> None:
        tier = open_tier(CODED)
        assert tier.put(key(1), payload(1)).stored_bytes == stored_bytes(CHUNK_BYTES)
        assert load(tier, 1) == payload(1)

    def test_each_object_reads_what_others_have_stored_in_another_way(self, open_tier: OpenTier) -> None:
        tiers = [open_tier(scope) for scope in (SCOPE, CODED, CODED_MAX)]
        for number, tier in enumerate(tiers):
            tier.put(key(number), kv_payload(number))
        for tier in tiers:
            assert [load(tier, number) for number in range(3)] == [kv_payload(number) for number in range(3)]
            assert tier.contains([key(number) for number in range(3)]) == [True] * 3

    def test_a_compressed_chunk_of_another_shape_is_refused(self, open_tier: OpenTier) -> None:
        open_tier(CODED).put(key(1), kv_payload(1))
        for change in (-2, 2):
            other = replace(SCOPE, chunk_bytes=CHUNK_BYTES + change)
            with pytest.raises(Corrupt, match="another size"):
                load(open_tier(other), 1, other.chunk_bytes)
        with pytest.raises(Corrupt, match="another layout"):
            load(open_tier(replace(SCOPE, layout="another layout")), 1)

    def test_put_replaces(self, tier: Tier) -> None:
        tier.put(key(1), payload(1))
        tier.put(key(1), payload(2))
        assert load(tier, 1) == payload(2)

    def test_contains_answers_in_the_order_asked(self, tier: Tier) -> None:
        tier.put(key(1), payload(1))
        tier.put(key(3), payload(3))
        assert tier.contains([key(3), key(2), key(1), key(3)]) == [True, False, True, True]
        assert tier.contains([]) == []

    def test_delete_removes_and_may_be_repeated(self, tier: Tier) -> None:
        tier.put(key(1), payload(1))
        tier.delete(key(1))
        tier.delete(key(1))
        assert tier.contains([key(1)]) == [False]
        assert load(tier, 1) is None

    def test_another_object_sees_the_chunk(self, open_tier: OpenTier) -> None:
        first, second = open_tier(SCOPE), open_tier(SCOPE)
        first.put(key(1), payload(1))
        assert load(second, 1) == payload(1)
        second.delete(key(1))
        assert load(first, 1) is None

    def test_chunks_outlive_the_object(self, open_tier: OpenTier) -> None:
        first = open_tier(SCOPE)
        first.put(key(1), payload(1))
        first.close()
        assert load(open_tier(SCOPE), 1) == payload(1)

    @pytest.mark.parametrize("other", OTHER_SCOPES, ids=OTHER_SCOPE_NAMES)
    def test_scopes_do_not_meet(self, open_tier: OpenTier, other: TierScope) -> None:
        here, there = open_tier(SCOPE), open_tier(other)
        here.put(key(1), payload(1))
        assert load(there, 1) is None
        assert there.contains([key(1)]) == [False]
        there.put(key(1), payload(2))
        there.delete(key(1))
        assert load(here, 1) == payload(1)

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            (TierScope(SCOPE.namespace, 0, "another layout", CHUNK_BYTES), "layout"),
            (TierScope(SCOPE.namespace, 0, SCOPE.layout, CHUNK_BYTES + 1), "bytes|size"),
            (TierScope(SCOPE.namespace, 0, SCOPE.layout, CHUNK_BYTES - 1), "bytes|size"),
        ],
        ids=["layout", "longer", "shorter"],
    )
    def test_a_chunk_of_another_shape_is_refused(self, open_tier: OpenTier, other: TierScope, said: str) -> None:
        open_tier(SCOPE).put(key(1), payload(1))
        with pytest.raises(Corrupt, match=said):
            load(open_tier(other), 1, other.chunk_bytes)

    def test_parts_of_chunks_lie_beside_them_at_their_own_length(self, open_tier: OpenTier) -> None:
        """A part is no longer than itself: what follows it in its slot is another chunk's."""
        tier = open_tier(dataclasses.replace(SCOPE, part_bytes=(CHUNK_BYTES, 4096, 300)))
        for number, size in enumerate((4096, 300, CHUNK_BYTES)):
            tier.put(key(number), payload(number, size))
        for number, size in enumerate((4096, 300, CHUNK_BYTES)):
            assert load(tier, number, size) == payload(number, size)
        for wrong in (300, CHUNK_BYTES):
            with pytest.raises(Corrupt):
                load(tier, 0, wrong)
        with pytest.raises(ConfigError, match="bytes"):
            tier.put(key(5), payload(5, 5000))

    def test_put_of_a_wrong_size_is_refused(self, tier: Tier) -> None:
        with pytest.raises(ConfigError, match="bytes"):
            tier.put(key(1), payload(1)[:-1])
        assert tier.contains([key(1)]) == [False]

    def test_calls_from_several_threads(self, tier: Tier) -> None:
        def work(number: int) -> bool:
            tier.put(key(number), payload(number))
            found = load(tier, number) == payload(number)
            if number % 2:
                tier.delete(key(number))
            return found

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(NUM_KEYS)))
        assert tier.contains([key(number) for number in range(NUM_KEYS)]) == [True, False] * (NUM_KEYS // 2)

    def test_a_reader_never_sees_a_mixture(self, open_tier: OpenTier) -> None:
        """Two payloads alternate under one key, with deletions, while others read."""
        writer, reader = open_tier(SCOPE), open_tier(SCOPE)
        allowed = {None, bytes(payload(1)), bytes(payload(2))}
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                writer.put(key(0), payload(1))
                writer.put(key(0), payload(2))
                writer.delete(key(0))

        with ThreadPoolExecutor(3) as pool:
            writing = pool.submit(write)
            try:
                for seen in pool.map(lambda _: load(reader, 0), range(100)):
                    assert seen in allowed
            finally:
                stop.set()
            writing.result()

    def test_against_a_model(self, open_tier: OpenTier) -> None:
        limits = settings(max_examples=self.model_examples, stateful_step_count=30, deadline=None)
        run_state_machine_as_test(lambda: TierMachine(open_tier), settings=limits)

    def test_close_may_be_repeated(self, tier: Tier) -> None:
        tier.close()
        tier.close()


class BoundedTierContract(TierContract):
    """What a tier must do besides if the directory decides what it keeps."""

    @pytest.fixture
    def bounded(self, open_tier: OpenTier) -> BoundedTier:
        tier = open_tier(SCOPE)
        assert isinstance(tier, BoundedTier)
        return tier

    def test_scan_lists_keys_and_sizes(self, bounded: BoundedTier) -> None:
        for number in range(5):
            bounded.put(key(number), payload(number))
        bounded.put(key(1), payload(7))
        bounded.delete(key(3))
        assert sorted(bounded.scan()) == sorted((key(number), stored_bytes(CHUNK_BYTES)) for number in (0, 1, 2, 4))

    def test_scan_tells_the_room_that_a_compressed_chunk_takes(self, open_tier: OpenTier) -> None:
        tier = open_tier(CODED)
        assert isinstance(tier, BoundedTier)
        sizes = {key(number): tier.put(key(number), kv_payload(number), key(9)).stored_bytes for number in range(4)}
        assert dict(tier.scan()) == sizes and max(sizes.values()) < CHUNK_BYTES
        assert tier.parents(list(sizes)) == dict.fromkeys(sizes, key(9))

    def test_scan_lists_parts_too_and_their_chunks(self, open_tier: OpenTier) -> None:
        tier = open_tier(dataclasses.replace(SCOPE, part_bytes=(300,)))
        assert isinstance(tier, BoundedTier)
        tier.put(key(1), payload(1))
        tier.put(key(2), payload(2, 300), key(1))
        assert dict(tier.scan()) == {key(1): stored_bytes(CHUNK_BYTES), key(2): stored_bytes(300)}
        assert tier.parents([key(1), key(2)]) == {key(2): key(1)}

    @pytest.mark.parametrize("other", OTHER_SCOPES, ids=OTHER_SCOPE_NAMES)
    def test_scan_lists_chunks_of_its_own_scope(
        self, open_tier: OpenTier, bounded: BoundedTier, other: TierScope
    ) -> None:
        open_tier(other).put(key(1), payload(1))
        assert list(bounded.scan()) == []


class TierMachine(RuleBasedStateMachine):
    """Two objects on one medium against a dict."""

    numbers = st.integers(0, NUM_MODEL_KEYS - 1)

    def __init__(self, open_tier: OpenTier) -> None:
        super().__init__()
        self.open_tier = open_tier
        self.tiers = [open_tier(SCOPE), open_tier(SCOPE)]
        for number in range(NUM_MODEL_KEYS):
            self.tiers[0].delete(key(number))
        self.model: dict[int, int] = {}

    @rule(which=st.integers(0, 1), number=numbers, content=numbers)
    def put(self, which: int, number: int, content: int) -> None:
        self.tiers[which].put(key(number), payload(content))
        self.model[number] = content

    @rule(which=st.integers(0, 1), number=numbers)
    def get(self, which: int, number: int) -> None:
        wanted = bytes(payload(self.model[number])) if number in self.model else None
        assert load(self.tiers[which], number) == wanted

    @rule(which=st.integers(0, 1), number=numbers)
    def delete(self, which: int, number: int) -> None:
        self.tiers[which].delete(key(number))
        self.model.pop(number, None)

    @rule(which=st.integers(0, 1), asked=st.lists(numbers))
    def contains(self, which: int, asked: list[int]) -> None:
        answers = self.tiers[which].contains([key(number) for number in asked])
        assert answers == [number in self.model for number in asked]

    @rule(which=st.integers(0, 1))
    def list_all(self, which: int) -> None:
        tier = self.tiers[which]
        if isinstance(tier, BoundedTier):
            assert sorted(tier.scan()) == sorted((key(number), stored_bytes(CHUNK_BYTES)) for number in self.model)

    @rule(which=st.integers(0, 1))
    def reopen(self, which: int) -> None:
        self.tiers[which].close()
        self.tiers[which] = self.open_tier(SCOPE)

    def teardown(self) -> None:
        for tier in self.tiers:
            tier.close()
