"""Whole instances when Redis or S3 fails: requests are served on, no byte is wrong, a metric and a log line name the cause, and when it is
over the tier is used again. serve() compares every byte."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmc.cache.keys import KeyChain, root
from lmc.cache.tiers.format import FOOTER_BYTES
from tests import services
from tests.cache.instance import CHUNK_TOKENS, Instance, prompt, settings
from tests.services import Last, Proxy, RedisServer

pytestmark = [pytest.mark.fault, pytest.mark.service]

TOKENS = prompt(1, 50)  # six chunks and a bit
PATIENCE = {"lookup_deadline": 15, "load_deadline": 15}  # more than any fault takes, on a busy machine too
_prefixes = itertools.count()
_seeds = itertools.count(1000)


@dataclass(frozen=True)
class Fault:
    begin: Callable[[RedisServer, Proxy], object]
    said: str  # by a warning
    load: str  # the cause when a chunk is loaded; "": it is loaded well
    write: str  # the cause when one is written
    ask: str  # the cause when the tier is asked what it holds


def change_values(change: Callable[[bytes], bytes]) -> Callable[[RedisServer, Proxy], None]:
    def begin(server: RedisServer, front: Proxy) -> None:
        with server.client() as client:
            for name in client.keys("*"):
                client.set(name, change(client.get(name)))

    return begin


def fill(server: RedisServer, front: Proxy) -> None:
    with server.client() as client:
        client.config_set("maxmemory", 1)


def to_client(fault: services.Fault) -> Callable[[object, Proxy], None]:
    def begin(server: object, front: Proxy) -> None:
        front.to_client = fault

    return begin


def refusal(status: str) -> services.Fault:
    answer = Last(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
    return lambda _: answer


REDIS_FAULTS = {
    "killed": Fault(lambda server, _: server.kill(), "clos|reset|refused", "error", "error", "error"),
    "paused": Fault(lambda server, _: server.pause(), "(?i)timed? ?out", "error", "error", "error"),
    "out of memory": Fault(fill, "OOM", "", "full", ""),
    "garbage": Fault(
        to_client(lambda data: random.Random(len(data)).randbytes(9000)),
        "reply starts with",
        "corrupt",
        "corrupt",
        "error",
    ),
    "reset": Fault(to_client(lambda data: Last(data[:3])), "reset|closed", "error", "error", "error"),
    "bit flipped": Fault(change_values(lambda value: bytes([value[0] ^ 1]) + value[1:]), "checksum", "corrupt", "", ""),
    "truncated": Fault(change_values(lambda value: value[:-1]), "bytes instead of", "corrupt", "", ""),
    "older version": Fault(
        change_values(lambda value: value[: 8 - FOOTER_BYTES] + b"\x01" + value[9 - FOOTER_BYTES :]),
        "footer is of version 1",
        "corrupt",
        "",
        "",
    ),
}
S3_FAULTS = {
    "500": Fault(to_client(refusal("500 Internal Server Error")), "500", "error", "error", "error"),
    "slow down": Fault(to_client(refusal("503 Slow Down")), "503", "error", "error", "error"),
    "reset": Fault(
        to_client(lambda data: Last(data[:20])), "error sending request|reset|closed", "error", "error", "error"
    ),
}


@contextmanager
def running(**values: object) -> Iterator[Instance]:
    instance = Instance(settings(**PATIENCE, **values))
    try:
        yield instance
    finally:
        instance.close()


def suffer(instance: Instance, tier: str, fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    """Load, ask and write while the fault lasts. The breaker may have opened before the later ones."""

    def failed(operation: str, cause: str) -> float:
        return instance.metric("failure_causes_total", operation=operation, tier=tier, cause=cause)

    keys = KeyChain(root(instance.scheduler.namespace), CHUNK_TOKENS).extend(TOKENS)
    instance.scheduler.directory.learn(tier, keys, [True] * len(keys))  # as if it had been asked before
    served = instance.serve(TOKENS)
    assert instance.metric("ask_seconds_count", tier=tier) == 0, (
        "nothing was unknown, and a failed load is not waited for twice"
    )
    if fault.load:
        assert (served.loaded, served.miss) == (0, "load failed")
        assert failed("stage", fault.load) > 0
    else:
        assert served.sources == {tier: 48}
    new = prompt(2, 50)
    assert instance.serve(new).miss == ("remote failed" if fault.ask else "never stored")
    if fault.ask:
        assert instance.metric("ask_failures_total", tier=tier, cause=fault.ask) > 0
    if fault.write:
        assert failed("write", fault.write) + failed("write", "unavailable") > 0
    assert instance.serve(new).sources == {"host": 48}, "host memory serves on"
    warnings = [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
    assert any(re.search(fault.said, line) for line in warnings), warnings


def recover(instance: Instance, tier: str) -> None:
    """The tier is used again, and nothing is left of what failed."""
    before = instance.metric("written_chunks_total", tier=tier)

    def used() -> bool:
        instance.serve(prompt(3, 50))
        return instance.metric("written_chunks_total", tier=tier) > before

    services.wait_until(used, "a write after the fault")

    def read() -> bool:
        """Ask for what is not there; that is an answer too."""
        tokens = prompt(next(_seeds), 20)
        keys = KeyChain(root(instance.scheduler.namespace), CHUNK_TOKENS).extend(tokens)
        instance.scheduler.directory.learn(tier, keys, [True] * len(keys))
        instance.serve(tokens)
        return instance.metric("breaker_open", tier=tier, direction="read") == 0

    services.wait_until(read, "a read after the fault")
    instance.serve(TOKENS)
    assert instance.serve(TOKENS).sources == {"host": 48}
    assert instance.scheduler.directory.num_pins == instance.scheduler.directory.num_open == 0
    assert all(instance.metric("breaker_open", tier=tier, direction=way) == 0 for way in ("read", "write"))


@pytest.mark.parametrize("fault", REDIS_FAULTS.values(), ids=REDIS_FAULTS.keys())
def test_redis(tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: Fault) -> None:
    with services.redis_server(tmp_path) as server, services.proxy(server.port) as front:
        with running(redis_url=server.url, redis_timeout=10) as other:
            other.serve(TOKENS)
        with running(redis_url=f"redis://{services.LOCAL}:{front.port}", redis_timeout=1) as instance:
            fault.begin(server, front)
            suffer(instance, "redis", fault, caplog)
            front.to_client = None
            if server.process.poll() is None:
                server.resume()
                with server.client() as client:
                    client.config_set("maxmemory", 0)
                recover(instance, "redis")
            else:
                with services.redis_server(tmp_path, port=server.port):
                    recover(instance, "redis")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with services.s3_server("chunks") as endpoint:
        yield endpoint


@pytest.mark.parametrize("fault", S3_FAULTS.values(), ids=S3_FAULTS.keys())
def test_s3(endpoint: str, caplog: pytest.LogCaptureFixture, fault: Fault) -> None:
    values = {"s3_bucket": "chunks", "s3_access_key_id": "id", "s3_secret_access_key": "s"}
    values["s3_prefix"] = f"instance{next(_prefixes)}"
    with services.proxy(int(endpoint.rpartition(":")[2])) as front:
        with running(**values, s3_endpoint=endpoint, s3_timeout=10) as other:
            other.serve(TOKENS)
        own = f"http://{services.LOCAL}:{front.port}"
        with running(**values, s3_endpoint=own, s3_timeout=1) as instance:
            fault.begin(None, front)
            suffer(instance, "s3", fault, caplog)
            front.to_client = None
            recover(instance, "s3")
