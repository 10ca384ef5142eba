"""The S3 tier under a store that fails, stalls, hangs up or lies."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import obstore
import pytest

from lmc.cache.sections import Compress, S3Config
from lmc.cache.tiers.breaker import Breaker, TierOpen
from lmc.cache.tiers.format import FOOTER_BYTES
from lmc.cache.tiers.s3 import S3Tier
from lmc.errors import Corrupt, TierError
from tests import services
from tests.contracts.tier import CHUNK_BYTES, CODED, SCOPE, key, kv_payload, load, payload
from tests.services import Proxy

pytestmark = [pytest.mark.fault, pytest.mark.service]

SOON = 60.0  # for calls that end by the time-out, on a busy machine too
_prefixes = itertools.count()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with services.s3_server("chunks") as endpoint:
        yield endpoint


@pytest.fixture
def front(endpoint: str) -> Iterator[Proxy]:
    with services.proxy(int(endpoint.rpartition(":")[2])) as running:
        yield running


@pytest.fixture
def tier(front: Proxy) -> S3Tier:
    """A tier behind the proxy, with a prefix of its own."""
    return open_tier(front, timeout=20.0)


@pytest.fixture
def hasty(front: Proxy) -> S3Tier:
    """One whose time-out is short enough to be run into."""
    return open_tier(front, timeout=1.0)


def open_tier(front: Proxy, timeout: float) -> S3Tier:
    settings = {"endpoint": f"http://{services.LOCAL}:{front.port}", "access_key_id": "id", "secret_access_key": "s"}
    config = {"bucket": "chunks", "prefix": f"fault{next(_prefixes)}", "timeout": timeout}
    return S3Tier(S3Config.model_validate(settings | config), SCOPE)


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def refuse(status: str, times: int | None = None) -> services.Fault:
    """Answer requests with an error status, so many times or always."""
    left = itertools.count() if times is None else iter(range(times))
    answer = services.Last(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
    return lambda data: data if next(left, None) is None else answer


CALLS: dict[str, Callable[[S3Tier], object]] = {
    "put": lambda tier: tier.put(key(1), payload(1)),
    "get": lambda tier: load(tier, 1),
    "contains": lambda tier: tier.contains([key(1), key(2)]),
    "delete": lambda tier: tier.delete(key(1)),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@every_call
@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Slow Down"])
def test_a_store_that_always_fails(front: Proxy, hasty: S3Tier, status: str, call: Callable[[S3Tier], object]) -> None:
    hasty.put(key(1), payload(1))
    front.to_client = refuse(status)
    with ends_within(SOON), pytest.raises(TierError, match="cannot") as caught:
        call(hasty)
    assert "\n" not in str(caught.value)
    front.to_client = None
    call(hasty)


@every_call
def test_a_store_that_fails_in_passing_is_asked_again(
    front: Proxy, tier: S3Tier, call: Callable[[S3Tier], object]
) -> None:
    tier.put(key(1), payload(1))
    front.to_client = refuse("500 Internal Server Error", times=1)
    call(tier)
    front.to_client = refuse("503 Slow Down", times=1)
    call(tier)


@every_call
def test_a_store_that_stalls_costs_no_more_than_its_time_outs(
    front: Proxy, hasty: S3Tier, call: Callable[[S3Tier], object]
) -> None:
    hasty.put(key(1), payload(1))
    over = threading.Event()
    front.to_client = lambda data: data if over.wait(120) else b""
    with ends_within(SOON), pytest.raises(TierError, match=r"127\.0\.0\.1"):
        call(hasty)
    over.set()
    hasty.put(key(1), payload(2))
    assert load(hasty, 1) == payload(2)


def test_a_breaker_spares_the_wait(front: Proxy, hasty: S3Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    breaker = Breaker(hasty, threshold=1, now=lambda: 0.0)
    breaker.put(key(1), payload(1))
    front.to_client = refuse("503 Slow Down")
    with pytest.raises(TierError):
        load(breaker, 1)
    monkeypatch.setattr(S3Tier, "get", lambda *_: pytest.fail("the store was asked"))
    with pytest.raises(TierOpen, match="s3 tier, reads: failed 1 times in a row"):
        load(breaker, 1)


@pytest.mark.parametrize("passed", [0, 20, 300, 5_000, 40_000])
def test_a_connection_reset_inside_an_object(front: Proxy, hasty: S3Tier, passed: int) -> None:
    hasty.put(key(1), payload(1))
    left = passed

    def cut(data: bytes) -> bytes:
        nonlocal left
        kept = data[:left]
        left -= len(kept)
        return kept if left else services.Last(kept)

    front.to_client = cut
    with ends_within(SOON), pytest.raises(TierError, match=r"127\.0\.0\.1"):
        load(hasty, 1)
    front.to_client = None
    assert load(hasty, 1) == payload(1)


def test_a_connection_reset_inside_a_store_changes_nothing(front: Proxy, hasty: S3Tier) -> None:
    hasty.put(key(1), payload(1))
    front.to_server = lambda data: services.Last(data[:20_000])
    for number in (1, 2):
        with pytest.raises(TierError):
            hasty.put(key(number), payload(7))
    front.to_server = None
    assert load(hasty, 1) == payload(1)
    assert load(hasty, 2) is None


def test_damage_on_the_way_is_found(front: Proxy, tier: S3Tier) -> None:
    tier.put(key(1), payload(1))
    marker = bytes(payload(1)[1_000:1_016])

    def damage(data: bytes) -> bytes:
        return data.replace(marker, bytes(16))

    front.to_client = damage
    with pytest.raises(Corrupt, match="payload does not match its checksum"):
        load(tier, 1)
    front.to_client = lambda data: data.replace(SCOPE.layout.encode(), b"x" * len(SCOPE.layout))
    with pytest.raises(Corrupt, match="footer does not match its checksum"):
        load(tier, 1)
    front.to_client = None
    assert load(tier, 1) == payload(1)


@pytest.mark.parametrize("size", [0, 1, FOOTER_BYTES, FOOTER_BYTES + CHUNK_BYTES - 1, 60_000])
def test_an_object_of_a_wrong_size_is_corrupt_and_can_be_replaced(tier: S3Tier, size: int) -> None:
    obstore.put(tier._store, tier._name(key(1)), bytes(size))
    with pytest.raises(Corrupt, match=f"has {size} bytes instead of 44096"):
        load(tier, 1)
    tier.put(key(1), payload(2))
    assert load(tier, 1) == payload(2)


@pytest.mark.parametrize("compress", ["lossless", "lossless-max"])
def test_a_damaged_compressed_object_is_never_served(endpoint: str, compress: Compress) -> None:
    config = S3Config(
        bucket="chunks", endpoint=endpoint, prefix=compress, access_key_id="a", secret_access_key="b", timeout=20.0
    )
    tier = S3Tier(config, replace(CODED, compress=compress))
    tier.put(key(1), kv_payload(1))
    out, rng = memoryview(bytearray(CHUNK_BYTES)), random.Random(1)
    good = bytes(obstore.get(tier._store, tier._name(key(1))).bytes())
    for number in range(100):
        place = rng.randrange(len(good))
        flipped = good[:place] + bytes([good[place] ^ 1 << number % 8]) + good[place + 1 :]
        obstore.put(tier._store, tier._name(key(1)), good[:place] if number % 3 == 0 else flipped)
        with pytest.raises(Corrupt):
            tier.get(key(1), out)
    obstore.put(tier._store, tier._name(key(1)), good)
    assert load(tier, 1) == kv_payload(1)


IN_FOOTER = [0, 8, 9, 12, 40, 80, 3000, FOOTER_BYTES - 1]


@pytest.mark.parametrize("position", [0, 20_000, CHUNK_BYTES - 1, *(CHUNK_BYTES + place for place in IN_FOOTER)])
def test_a_flipped_bit_is_never_served(tier: S3Tier, position: int) -> None:
    tier.put(key(1), payload(1))
    stored = bytearray(obstore.get(tier._store, tier._name(key(1))).bytes())
    for bit in range(8):
        stored[position] ^= 1 << bit
        obstore.put(tier._store, tier._name(key(1)), bytes(stored))
        with pytest.raises(Corrupt):
            tier.get(key(1), memoryview(bytearray(CHUNK_BYTES)))
        stored[position] ^= 1 << bit


def test_a_forbidden_bucket_is_an_error_and_not_a_miss(front: Proxy, hasty: S3Tier) -> None:
    front.to_client = refuse("403 Forbidden")
    for call in CALLS.values():
        with pytest.raises(TierError):
            call(hasty)


def test_garbage_instead_of_http(front: Proxy, hasty: S3Tier) -> None:
    hasty.put(key(1), payload(1))
    front.to_client = lambda data: services.Last(b"\x00garbage\r\n" * 10)
    for call in CALLS.values():
        with ends_within(SOON), pytest.raises(TierError):
            call(hasty)
