"""The Redis tier under a server that dies, stalls, fills up or lies: each call ends in time, and no wrong byte is taken for a chunk."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lmc.cache.sections import Compress, RedisConfig
from lmc.cache.tiers.breaker import Breaker, TierOpen
from lmc.cache.tiers.format import FOOTER_BYTES, TierScope
from lmc.cache.tiers.redis import RedisTier
from lmc.errors import Corrupt, TierError, TierFull
from tests import services
from tests.contracts.tier import CHUNK_BYTES, CODED, SCOPE, key, kv_payload, load, payload
from tests.services import Proxy, RedisServer

pytestmark = [pytest.mark.fault, pytest.mark.service]

TIMEOUT = 1.0  # of calls that the tests let run into it
PATIENCE = 60.0  # of calls that must not run into it
SOON = 50.0  # for calls that end by the time-out, on a busy machine too
MEGABYTES = TierScope(SCOPE.namespace, 0, SCOPE.layout, 3_000_000)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with services.redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def server(shared_server: RedisServer) -> Iterator[RedisServer]:
    with shared_server.client() as client:
        client.flushall()
    yield shared_server
    shared_server.resume()


@pytest.fixture
def tier(server: RedisServer) -> Iterator[RedisTier]:
    opened = open_tier(server.port, timeout=PATIENCE)
    yield opened
    opened.close()


@pytest.fixture
def hasty(server: RedisServer) -> Iterator[RedisTier]:
    """A tier whose time-out is short enough to be run into."""
    opened = open_tier(server.port)
    yield opened
    opened.close()


@pytest.fixture
def front(server: RedisServer) -> Iterator[Proxy]:
    with services.proxy(server.port) as running:
        yield running


def open_tier(port: int, scope: TierScope = SCOPE, timeout: float = TIMEOUT) -> RedisTier:
    return RedisTier(RedisConfig(url=f"redis://{services.LOCAL}:{port}", timeout=timeout), scope)


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


CALLS: dict[str, Callable[[RedisTier | Breaker], object]] = {
    "put": lambda tier: tier.put(key(1), payload(1)),
    "get": lambda tier: load(tier, 1),
    "contains": lambda tier: tier.contains([key(1), key(2)]),
    "delete": lambda tier: tier.delete(key(1)),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@every_call
def test_a_paused_server_costs_no_more_than_the_time_out(
    server: RedisServer, hasty: RedisTier, call: Callable[[RedisTier], object]
) -> None:
    hasty.put(key(1), payload(1))
    server.pause()
    with ends_within(SOON), pytest.raises(TierError, match=r"127\.0\.0\.1.*(?i:tim)"):
        call(hasty)
    server.resume()
    call(hasty)


def test_a_late_reply_is_not_taken_for_the_next_one(server: RedisServer, hasty: RedisTier) -> None:
    for number in (1, 2):
        hasty.put(key(number), payload(number))
    for _ in range(5):
        server.pause()
        with pytest.raises(TierError):
            load(hasty, 1)
        server.resume()
        assert load(hasty, 2) == payload(2)


def test_a_breaker_spares_the_wait(server: RedisServer, hasty: RedisTier, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    breaker = Breaker(hasty, threshold=2, first_wait=0.2, now=lambda: now)
    breaker.put(key(1), payload(1))
    server.pause()
    for _ in range(2):
        with pytest.raises(TierError):
            load(breaker, 1)
    with monkeypatch.context() as patch:
        patch.setattr(RedisTier, "get", lambda *_: pytest.fail("the server was asked"))
        with pytest.raises(TierOpen, match="redis tier, reads: failed 2 times in a row"):
            load(breaker, 1)
    server.resume()
    now = 0.3
    assert load(breaker, 1) == payload(1)
    assert breaker.state("read") == "closed"


@every_call
def test_a_killed_server_is_an_error_until_it_is_back(tmp_path: Path, call: Callable[[RedisTier], object]) -> None:
    with services.redis_server(tmp_path) as first:
        tier = open_tier(first.port)
        tier.put(key(1), payload(1))
        first.kill()
        with ends_within(SOON), pytest.raises(TierError, match=f"127.0.0.1:{first.port}: cannot"):
            call(tier)
    with services.redis_server(tmp_path, port=first.port):
        assert load(tier, 1) is None
        call(tier)
        tier.put(key(1), payload(1))
        assert load(tier, 1) == payload(1)


def test_a_full_server_is_a_full_tier(tmp_path: Path) -> None:
    with services.redis_server(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as server:
        tier = open_tier(server.port)
        stored = []
        with pytest.raises(TierFull, match="OOM"):
            for number in range(200):
                tier.put(key(number), payload(number))
                stored.append(number)
        assert stored
        for number in stored:
            assert load(tier, number) == payload(number)
        for number in stored:
            tier.delete(key(number))
        tier.put(key(500), payload(500))


def test_a_server_that_evicts_only_loses_chunks(tmp_path: Path) -> None:
    with services.redis_server(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru") as server:
        tier = open_tier(server.port)
        for number in range(150):
            tier.put(key(number), payload(number))
        answers = [load(tier, number) for number in range(150)]
        assert None in answers
        assert answers[-1] == payload(149)
        for number, answer in enumerate(answers):
            assert answer in (None, payload(number))


def test_a_read_only_replica_is_an_error(tmp_path: Path, server: RedisServer) -> None:
    with services.redis_server(tmp_path, "--replicaof", services.LOCAL, str(server.port)) as replica:
        tier = open_tier(replica.port)
        with pytest.raises(TierError, match="READONLY"):
            tier.put(key(1), payload(1))


def test_a_cluster_that_loses_a_master_serves_what_the_others_hold(tmp_path: Path) -> None:
    with services.redis_cluster(tmp_path) as nodes:
        config = RedisConfig(url=nodes[0].url, mode="cluster", timeout=TIMEOUT)
        patient = RedisTier(config.model_copy(update={"timeout": PATIENCE}), SCOPE)
        for number in range(30):
            patient.put(key(number), payload(number))
        patient.close()
        tier = RedisTier(config, SCOPE)
        tier.contains([key(number) for number in range(30)])  # learns the topology
        nodes[2].kill()
        outcomes = []
        for number in range(30):
            with ends_within(SOON):
                try:
                    assert load(tier, number) == payload(number)
                    outcomes.append("chunk")
                except TierError as error:
                    assert "cannot load" in str(error)
                    outcomes.append("error")
        assert outcomes.count("chunk") > 10
        assert outcomes.count("error") > 3


IN_FOOTER = [0, 7, 8, 9, 10, 12, 19, 20, 28, 36, 40, 71, 72, 75, 76, 91, 92, 200, FOOTER_BYTES - 1]
FOOTER_POSITIONS = [CHUNK_BYTES + place for place in IN_FOOTER]
PAYLOAD_POSITIONS = [0, 1, 4095, 4096, 20_000, CHUNK_BYTES - 2, CHUNK_BYTES - 1]


@pytest.mark.parametrize("position", FOOTER_POSITIONS + PAYLOAD_POSITIONS)
def test_a_flipped_bit_is_never_served(server: RedisServer, tier: RedisTier, position: int) -> None:
    tier.put(key(1), payload(1))
    with server.client() as client:
        name = tier._name(key(1))
        byte = client.getrange(name, position, position)
        for bit in range(8):
            client.setrange(name, position, bytes([byte[0] ^ 1 << bit]))
            with pytest.raises(Corrupt):
                tier.get(key(1), memoryview(bytearray(CHUNK_BYTES)))
        client.setrange(name, position, byte)
    assert load(tier, 1) == payload(1)


@pytest.mark.parametrize("compress", ["lossless", "lossless-max"])
def test_a_damaged_compressed_value_is_never_served(server: RedisServer, compress: Compress) -> None:
    tier = open_tier(server.port, replace(CODED, compress=compress), timeout=PATIENCE)
    tier.put(key(1), kv_payload(1))
    out, rng = memoryview(bytearray(CHUNK_BYTES)), random.Random(1)
    with server.client() as client:
        good = client.get(tier._name(key(1)))
        for number in range(1000):
            place = rng.randrange(len(good))
            flipped = good[:place] + bytes([good[place] ^ 1 << number % 8]) + good[place + 1 :]
            client.set(tier._name(key(1)), good[:place] if number % 3 == 0 else flipped)
            with pytest.raises(Corrupt):
                tier.get(key(1), out)
        client.set(tier._name(key(1)), good)
    assert load(tier, 1) == kv_payload(1)
    tier.close()


@pytest.mark.parametrize("size", [0, 1, FOOTER_BYTES - 1, FOOTER_BYTES, FOOTER_BYTES + CHUNK_BYTES - 1, 60_000])
def test_a_value_of_a_wrong_size_is_corrupt_and_can_be_replaced(
    server: RedisServer, tier: RedisTier, size: int
) -> None:
    tier.put(key(1), payload(1))
    with server.client() as client:
        value = client.get(tier._name(key(1)))
        client.set(tier._name(key(1)), (value + bytes(60_000))[:size])
    with pytest.raises(Corrupt, match=f"has {size} bytes instead of 44096"):
        load(tier, 1)
    tier.put(key(1), payload(2))
    assert load(tier, 1) == payload(2)


def test_a_value_of_another_type_is_corrupt_and_can_be_deleted_or_replaced(
    server: RedisServer, tier: RedisTier
) -> None:
    for end in (lambda: tier.delete(key(1)), lambda: tier.put(key(1), payload(2))):
        with server.client() as client:
            client.lpush(tier._name(key(1)), b"surprise")
        with pytest.raises(Corrupt, match="WRONGTYPE"):
            load(tier, 1)
        end()
    assert load(tier, 1) == payload(2)


@pytest.mark.parametrize("refusal", ["min-replicas-to-write", "read-only replica"])
def test_a_server_that_refuses_writes_is_read_on(tmp_path: Path, server: RedisServer, refusal: str) -> None:
    writer = open_tier(server.port, timeout=PATIENCE)
    for number in range(3):
        writer.put(key(number), payload(number))
    with services.redis_server(tmp_path, "--replicaof", services.LOCAL, str(server.port)) as replica:
        with replica.client() as client:
            services.wait_until(lambda: client.dbsize() == 3, "the replica's copy")
            if refusal != "read-only replica":
                client.replicaof("NO", "ONE")
                client.config_set(refusal, 1)
        breaker = Breaker(open_tier(replica.port, timeout=PATIENCE))
        for number in range(20):
            with pytest.raises(TierError, match=r"READONLY|NOREPLICAS|left alone"):
                breaker.put(key(number), payload(number))
            assert load(breaker, number % 3) == payload(number % 3)
        assert (breaker.state("write"), breaker.state("read")) == ("open", "closed")


RIGHT_START = b"$44096\r\n"


@pytest.mark.parametrize(
    "reply",
    [
        b"+OK\r\n",
        b":1\r\n",
        b"\r\n",
        b"\r\n\r\n\r\n",
        b"*1\r\n$2\r\nno\r\n",
        b"$3\r\nabc\r\n",
        b"$99999999999999999999\r\n",
        b"$44096x\r\n",
        b"$44096\n" + bytes(50_000),
        b"-ERR something odd\r\n",
        b"-\xff\xfe\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        bytes(100_000),
        random.Random(1).randbytes(100_000),
        RIGHT_START + bytes(44_096) + b"\r\n",
        RIGHT_START + random.Random(2).randbytes(44_098),
        RIGHT_START + bytes(1000),
        b"$",
        b"$440",
        b"-ERR without an end",
    ],
    ids=lambda reply: repr(reply[:24]),
)
def test_a_server_that_returns_garbage(front: Proxy, reply: bytes) -> None:
    """The client is connected already, so the garbage is the reply to GET; the server says nothing more."""
    tier = open_tier(front.port)
    for number in (1, 2):
        tier.put(key(number), payload(number))
    assert load(tier, 1) == payload(1)
    replies = iter([reply])
    front.to_client = lambda _: next(replies, b"")
    with ends_within(SOON), pytest.raises(TierError):
        load(tier, 1)
    front.to_client = None
    assert load(tier, 2) == payload(2)
    tier.close()


@pytest.mark.parametrize("passed", [0, 1, 9, 100, 100_000, 2_999_999, 3_000_010, 3_004_000])
def test_a_connection_reset_inside_a_value(front: Proxy, passed: int) -> None:
    tier = open_tier(front.port, MEGABYTES, PATIENCE)
    tier.put(key(1), payload(1, MEGABYTES.chunk_bytes))
    front.to_client = cut_after(passed)
    with ends_within(PATIENCE - 1), pytest.raises(TierError, match=r"127\.0\.0\.1"):
        load(tier, 1, MEGABYTES.chunk_bytes)
    front.to_client = None
    assert load(tier, 1, MEGABYTES.chunk_bytes) == payload(1, MEGABYTES.chunk_bytes)
    tier.close()


@pytest.mark.parametrize("passed", [0, 1, 50, 100_000, 2_999_999, 3_000_200])
def test_a_connection_reset_inside_a_store_changes_nothing(front: Proxy, passed: int) -> None:
    tier = open_tier(front.port, MEGABYTES, PATIENCE)
    tier.put(key(1), payload(1, MEGABYTES.chunk_bytes))
    front.to_server = cut_after(passed)
    for number in (1, 2):
        with ends_within(PATIENCE - 1), pytest.raises(TierError, match=r"127\.0\.0\.1"):
            tier.put(key(number), payload(7, MEGABYTES.chunk_bytes))
        front.to_server = cut_after(passed)
    front.to_server = None
    assert load(tier, 1, MEGABYTES.chunk_bytes) == payload(1, MEGABYTES.chunk_bytes)
    assert load(tier, 2, MEGABYTES.chunk_bytes) is None
    tier.close()


def cut_after(num_bytes: int) -> services.Fault:
    left = num_bytes

    def fault(data: bytes) -> bytes:
        nonlocal left
        passed = data[:left]
        left -= len(passed)
        return passed if left else services.Last(passed)

    return fault


@pytest.mark.parametrize("direction", ["to_client", "to_server"])
def test_a_trickle_ends_at_the_deadline(front: Proxy, direction: str) -> None:
    """Every single socket operation succeeds quickly, and the whole takes seconds."""
    tier = open_tier(front.port, MEGABYTES, timeout=1.5)
    tier.put(key(1), payload(1, MEGABYTES.chunk_bytes))

    def trickle(data: bytes) -> bytes:
        time.sleep(0.2)
        return data

    setattr(front, direction, trickle)
    with ends_within(SOON), pytest.raises(TierError, match="timed out"):
        if direction == "to_client":
            load(tier, 1, MEGABYTES.chunk_bytes)
        else:
            tier.put(key(2), payload(2, MEGABYTES.chunk_bytes))
    setattr(front, direction, None)
    tier.close()


def test_random_damage_on_the_way(front: Proxy) -> None:
    """Bytes change, vanish or double at random: a load gives the chunk, nothing, or an error."""
    chance = random.Random(int(os.environ.get("LMC_TEST_SEED", "11")))
    tier = open_tier(front.port)
    tier.put(key(1), payload(1))

    def damage(data: bytes) -> bytes:
        place = chance.randrange(len(data))
        return chance.choice(
            [
                data,
                data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :],
                data[:place] + data[place + 1 :],
                data[:place] + data[place : place + 7] + data[place:],
            ]
        )

    outcomes = set()
    front.to_client = damage
    for _ in range(50):
        try:
            answer = load(tier, 1)
        except TierError:
            outcomes.add("error")
        else:
            outcomes.add("chunk" if answer is not None else "absent")
            assert answer in (None, payload(1))
    assert {"error", "chunk"} <= outcomes
    front.to_client = None
    assert load(tier, 1) == payload(1)
    tier.close()
