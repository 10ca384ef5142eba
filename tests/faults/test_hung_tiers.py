"""Tiers that neither fail nor answer: soon they are left alone, nothing waits behind what hangs, and an idle engine is idle."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmc.cache.tiers import file_read
from lmc.cache.tiers import open as open_module
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.late import TierHangs, wait_for
from lmc.cache.tiers.redis import RedisTier
from lmc.cache.tiers.stored import Moved
from tests import services
from tests.cache.instance import CHUNK_BYTES, Instance, prompt, settings
from tests.services import Last, Proxy

pytestmark = pytest.mark.fault

PROMPTS = [prompt(seed, 50) for seed in range(8)]  # six chunks and a bit each


class Hung:
    """Calls that enter while it is closed stay inside until it is opened, as in a file system whose server is gone."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.inside = 0

    def __call__(self, call: Callable[..., object]) -> Callable[..., object]:
        def wait(*arguments: object) -> object:
            self.inside += 1
            assert self.gate.wait(60)
            self.inside -= 1
            return call(*arguments)

        return wait


@pytest.fixture
def hung() -> Iterator[Hung]:
    made = Hung()
    yield made
    made.gate.set()


def tell_time(instance: Instance, seconds: float) -> None:
    """The breakers' clock, so that no test waits as long as an engine would."""
    for worker in instance.workers:
        for tier in worker._tiers.values():
            for circuit in tier._circuits.values():
                circuit._now = lambda: time.monotonic() + seconds


def until_told_stuck(instance: Instance, monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    """Let the calls under way seem to take longer than anybody's patience."""
    with monkeypatch.context() as patch:
        patch.setattr(type(instance.workers[0]._tiers[tier]), "patience", lambda *_: 0.0)
        tell_time(instance, 100.0)
        instance.pump()
    tell_time(instance, 0.0)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_disk_that_hangs_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hung: Hung, threads: int
) -> None:
    """A gate stands for the kernel: no file system here can be made to hang without being root on its machine."""
    first = Instance(settings(disk_path=tmp_path))
    for tokens in PROMPTS:
        first.serve(tokens)
    first.close()
    instance = Instance(settings(disk_path=tmp_path, io_threads=threads, load_deadline=0.2, close_timeout=0.1))
    directory = instance.scheduler.directory
    with monkeypatch.context() as patch:
        patch.setattr(file_read, "open_to_read", hung(file_read.open_to_read))
        assert instance.serve(PROMPTS[0], settle=False).loaded == 0
        until_told_stuck(instance, monkeypatch, "disk")
        assert directory.num_stuck == hung.inside == threads
        instance.settle()  # the idle engine does not wait for what may never end
        assert directory.num_stuck == directory.num_open == threads
        assert instance.metric("breaker_open", tier="disk", direction="read") == 1
        assert directory._places.num_free_slots == directory.usage()["host"][1] - directory.usage()["host"][0] - threads
        for tokens in PROMPTS[1:]:
            served = instance.serve(tokens, settle=False)
            assert (served.loaded, served.miss) == (0, "load failed"), "nobody waits for the deadline"
        for tokens in PROMPTS:
            instance.serve(tokens, settle=False)
            assert instance.serve(tokens, settle=False).sources == {"host": 48}, "what cannot be read is stored anew"
        assert hung.inside == threads, "no further thread was given to it"
    hung.gate.set()
    services.wait_until(lambda: pumped(instance) and directory.num_open == 0, "the end of what hung")
    directory.check()
    assert directory.num_pins == 0
    assert directory._places.num_free_slots == directory.usage()["host"][1] - directory.usage()["host"][0]
    instance.close()


def pumped(instance: Instance) -> bool:
    instance.pump()
    return True


@pytest.mark.parametrize("where", ["_make_folders", "_files", "parents"])
def test_a_disk_that_hangs_at_the_start_does_not_hang_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hung: Hung, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    first = Instance(settings(disk_path=tmp_path))
    first.serve(PROMPTS[0])
    first.close()
    monkeypatch.setattr(open_module, "_SHORTEST_PATIENCE", 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, where, hung(getattr(DiskTier, where)))
        instance = Instance(settings(disk_path=tmp_path, load_deadline=0.2, close_timeout=0.1))
        assert hung.inside == 1
        said = [record.getMessage() for record in caplog.records if "no answer for" in record.getMessage()]
        assert len(said) == 1 and "the next start" in said[0]
        for tokens in PROMPTS:
            assert instance.serve(tokens, settle=False).loaded == 0
            assert instance.serve(tokens, settle=False).sources == {"host": 48}, "the engine serves without it"
    hung.gate.set()
    services.wait_until(lambda: written_to(instance, "disk"), "the disk is used when it answers")
    services.wait_until(lambda: pumped(instance) and instance.scheduler.directory.num_open == 0, "the end of what hung")
    instance.scheduler.directory.check()
    instance.close()


def written_to(instance: Instance, tier: str) -> bool:
    for seed in range(100, 110):
        instance.serve(prompt(seed, 50), settle=False)
    return instance.metric("written_chunks_total", tier=tier) > 0


def test_a_scan_that_is_only_long_is_waited_for(hung: Hung) -> None:
    looks = itertools.count()

    def progress() -> int:
        look = next(looks)
        if look == 5:
            hung.gate.set()
        return look

    assert wait_for(hung(lambda: "found"), 0.01, "a scan", progress) == "found"
    hung.gate.clear()
    with pytest.raises(TierHangs, match=r"a scan: no answer for 0\.01 s"):
        wait_for(hung(lambda: "found"), 0.01, "a scan")


def test_a_disk_that_hangs_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hung: Hung) -> None:
    instance = Instance(settings(disk_path=tmp_path, io_threads=2, host_capacity=30 * CHUNK_BYTES, close_timeout=0.1))
    directory = instance.scheduler.directory
    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "_write", hung(DiskTier._write))
        instance.serve(PROMPTS[0], settle=False)
        services.wait_until(lambda: hung.inside == 2, "two writes that hang")
        until_told_stuck(instance, monkeypatch, "disk")
        instance.pump()
        assert directory.num_writing == {"disk": 2}, "those that waited behind them hold no slot any more"
        assert not instance.scheduler.busy
        for tokens in PROMPTS:
            instance.serve(tokens, settle=False)
        assert instance.metric("dropped_chunks_total", what="store") == 0
        assert instance.serve(PROMPTS[-1], settle=False).sources == {"host": 48}
    hung.gate.set()
    services.wait_until(lambda: pumped(instance) and directory.num_open == 0, "the end of what hung")
    directory.check()
    instance.close()


def accepts_and_never_answers(front: Proxy) -> None:
    front.to_client = lambda _: b""


def resets_inside_a_value(front: Proxy) -> None:
    front.to_client = lambda data: Last(data[:200])


def a_byte_at_a_time(front: Proxy) -> None:
    def trickle(data: bytes) -> bytes:
        time.sleep(0.3)
        return data[:1]

    front.to_client = trickle


@pytest.mark.service
@pytest.mark.parametrize("fault", [accepts_and_never_answers, resets_inside_a_value, a_byte_at_a_time])
@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_a_server_that_hangs_is_left_alone(tmp_path: Path, kind: str, fault: Callable[[Proxy], None]) -> None:
    server = services.redis_server(tmp_path) if kind == "redis" else services.s3_server("chunks")
    with server as running:
        port = running.port if kind == "redis" else int(running.rpartition(":")[2])
        with services.proxy(port) as front:
            own = f"{services.LOCAL}:{front.port}"
            values: dict[str, object] = {"redis_url": f"redis://{own}", "redis_timeout": 1}
            if kind == "s3":
                values = {"s3_bucket": "chunks", "s3_endpoint": f"http://{own}", "s3_timeout": 1}
                values |= {"s3_access_key_id": "id", "s3_secret_access_key": "secret"}
            one = Instance(settings(**values, host_capacity=16 * CHUNK_BYTES))
            for tokens in PROMPTS:
                one.serve(tokens)
            fault(front)
            closed = [way for way in ("read", "write") if not opened(one, kind, way)]
            assert not closed, "both directions were left alone"
            polls = [one.serve(prompt(1000 + seed, 50), settle=False).polls for seed in range(3)]
            assert all(one.metric("breaker_open", tier=kind, direction=way) == 1 for way in ("read", "write")), polls
            served = one.serve(prompt(1002, 50), settle=False)
            assert served.sources == {"host": 48}
            front.to_client = None
            for connection in front.sockets:
                services._reset(connection)
            services.wait_until(lambda: recovered(one, kind), "a load after the fault", 60)
            one.settle()
            one.close()


def opened(instance: Instance, tier: str, way: str) -> bool:
    until = time.monotonic() + 60
    for seed in range(10_000):
        instance.serve(PROMPTS[seed % len(PROMPTS)] if way == "read" else prompt(100 + seed, 50), settle=False)
        if instance.metric("breaker_open", tier=tier, direction=way) == 1:
            return True
        if time.monotonic() > until:
            break
    return False


def recovered(instance: Instance, tier: str) -> bool:
    for seed in range(20, 24):
        instance.serve(prompt(seed, 50), settle=False)
    return any(tier in instance.serve(tokens, settle=False).sources for tokens in PROMPTS)


@pytest.mark.service
def test_a_tier_that_is_only_slow_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second per call, told by the breaker's clock."""
    with services.redis_server(tmp_path) as server:
        instance = Instance(settings(redis_url=server.url, redis_timeout=10, host_capacity=16 * CHUNK_BYTES))
        for tokens in PROMPTS:
            instance.serve(tokens)
        late = [0.0]
        for circuit in instance.workers[0]._tiers["redis"]._circuits.values():
            circuit._now = lambda: time.monotonic() + late[0]
        plain = RedisTier.get

        def slow(tier: RedisTier, *arguments: object) -> Moved:
            moved = plain(tier, *arguments)  # type: ignore[arg-type]
            late[0] += 1
            return moved

        monkeypatch.setattr(RedisTier, "get", slow)
        instance.serve(PROMPTS[0])
        assert instance.metric("breaker_open", tier="redis", direction="read") == 1
        assert instance.metric("breaker_open", tier="redis", direction="write") == 0
        instance.close()
