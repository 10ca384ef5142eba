"""The Mooncake tier when the master, the owner of a segment, or its own client fails: a load gives the chunk, nothing, or an error."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from lmc.cache.config import CacheConfig
from lmc.cache.sections import MooncakeConfig
from lmc.cache.tiers import mooncake, mooncake_process
from lmc.cache.tiers.check import check_tiers
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.mooncake import MooncakeTier
from lmc.cache.tiers.open import open_tiers
from lmc.errors import ConfigError, TierError, TierFull
from tests import services
from tests.cache.instance import CHUNK_BYTES, Instance, prompt, settings
from tests.contracts.tier import SCOPE, key, load, payload
from tests.services import LOCAL, MooncakeStore

pytestmark = [pytest.mark.fault, pytest.mark.service]

MEGABYTES = TierScope(SCOPE.namespace, 0, SCOPE.layout, 3 << 20)
PROMPTS = [prompt(seed, 50) for seed in range(6)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MooncakeStore]:
    with services.mooncake_store(tmp_path, segment=64 << 20, lease="1s") as running:
        yield running


@contextmanager
def opened(store: MooncakeStore, scope: TierScope = SCOPE, **settings: object) -> Iterator[MooncakeTier]:
    given = {"master": store.address, "metadata": store.metadata, "hostname": LOCAL, "timeout": 5.0}
    tier = MooncakeTier(MooncakeConfig.model_validate(given | settings), scope)
    try:
        yield tier
    finally:
        tier.close()


def client_of(tier: MooncakeTier) -> psutil.Process:
    with tier._client.connected() as process:
        return psutil.Process(process._process.pid)


@contextmanager
def others_run() -> Iterator[list[int]]:
    """Counts how often another thread gets its turn meanwhile."""
    turns = [0]
    over = threading.Event()

    def count() -> None:
        while not over.wait(0.01):
            turns[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    yield turns
    over.set()
    thread.join()


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "connecting"])
def test_a_paused_master_holds_neither_the_interpreter_nor_a_thread(
    store: MooncakeStore, monkeypatch: pytest.MonkeyPatch, connected: bool
) -> None:
    assert store.master is not None
    monkeypatch.setattr(mooncake_process, "START_SECONDS", 3.0)
    with opened(store, timeout=1.0) as tier:
        if connected:
            tier.put(key(1), payload(1))
        store.master.send_signal(signal.SIGSTOP)
        calls: list[Callable[[], object]] = [lambda: tier.contains([key(1)])]
        if connected:
            calls += [lambda: tier.put(key(2), payload(2)), lambda: tier.delete(key(1)), lambda: load(tier, 1)]
        for call in calls:
            with (
                others_run() as turns,
                pytest.raises(TierError, match=r"does not answer in time|cannot connect|no answer"),
            ):
                call()
            assert turns[0] > 10
        store.master.send_signal(signal.SIGCONT)
        services.wait_until(lambda: works(tier), "the master is used again")
        if connected:
            assert load(tier, 1) in (None, payload(1))


_numbers = itertools.count(100)


def works(tier: MooncakeTier) -> bool:
    """With a chunk of its own each time: one whose storing was not ended blocks its key for half a minute."""
    number, size = next(_numbers), tier._scope.chunk_bytes
    try:
        tier.put(key(number), payload(number, size))
        return load(tier, number, size) == payload(number, size)
    except TierError:
        return False


def test_a_master_that_is_killed_and_comes_back_empty(store: MooncakeStore) -> None:
    assert store.master is not None
    with opened(store) as tier:
        tier.put(key(1), payload(1))
        with store.master:
            store.master.kill()
        for call in (lambda: tier.contains([key(1)]), lambda: tier.put(key(2), payload(2)), lambda: load(tier, 1)):
            with pytest.raises(TierError, match=r"the master cannot be reached \(code -900\)"):
                call()
        store.start_master()
        services.wait_until(lambda: works(tier), "the master that is empty is used", 60)
        assert load(tier, 1) is None and tier.contains([key(1)]) == [False]


def test_what_a_killed_owner_had_is_absent(store: MooncakeStore) -> None:
    with opened(store) as tier:
        tier.put(key(1), payload(1))
        store.owners[0].kill()
        with suppress(TierError):  # until the master has noticed
            assert load(tier, 1) is None
        services.wait_until(lambda: tier.contains([key(1)]) == [False], "the master forgets it", 60)
        assert load(tier, 1) is None
        with pytest.raises(TierFull, match="no machine has room for it"):
            tier.put(key(2), payload(2))
        store.start_owner(64 << 20)
        assert works(tier)


def test_an_owner_killed_half_way_through_puts(store: MooncakeStore) -> None:
    size = MEGABYTES.chunk_bytes
    with opened(store, MEGABYTES) as tier:
        stored: list[int] = []

        def put() -> None:
            with suppress(TierError):
                for number in range(10_000):
                    tier.put(key(number % 12), payload(number % 12, size))
                    tier.delete(key(number % 12))
                    stored.append(number)

        thread = threading.Thread(target=put)
        thread.start()
        services.wait_until(lambda: len(stored) > 3, "some puts")
        store.owners[0].kill()
        thread.join()
        for number in range(12):
            with suppress(TierError):
                assert load(tier, number, size) in (None, payload(number, size))
        store.start_owner(64 << 20)
        services.wait_until(lambda: works(tier), "the new owner is used", 60)


def test_a_client_killed_half_way_through_puts(store: MooncakeStore) -> None:
    """What it was storing is absent for everybody; the next call has another client."""
    size = MEGABYTES.chunk_bytes
    with opened(store, MEGABYTES) as tier, opened(store, MEGABYTES, timeout=6.0) as other:
        killed = client_of(tier)

        def put() -> None:
            with suppress(TierError):
                for number in range(10_000):
                    tier.put(key(number % 12), payload(number % 12, size))
                    tier.delete(key(number % 12))

        thread = threading.Thread(target=put)
        thread.start()
        services.wait_until(lambda: True in other.contains([key(number) for number in range(12)]), "some put")
        killed.kill()
        thread.join()
        for number in range(12):
            assert load(other, number, size) in (None, payload(number, size))
        assert works(tier)
        assert client_of(tier).pid != killed.pid


def test_a_client_that_hangs_is_ended_before_its_memory_is_used_again(
    store: MooncakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake_process, "LONGEST_CALL", 0.0)
    with opened(store, timeout=2.0) as tier:
        tier.put(key(1), payload(1))
        hung = client_of(tier)
        hung.suspend()
        with others_run() as turns, pytest.raises(TierError, match="has not answered for 2 s, and is started anew"):
            load(tier, 1)
        assert turns[0] > 10
        assert not hung.is_running()
        assert load(tier, 1) == payload(1)


def test_an_owner_that_hangs_holds_a_call_for_a_limited_time(
    store: MooncakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would wait for a minute; here it may take three seconds, then the client is ended."""
    monkeypatch.setattr(mooncake_process, "LONGEST_CALL", 1.0)
    with opened(store, timeout=2.0) as tier:
        tier.put(key(1), payload(1))
        store.owners[0].send_signal(signal.SIGSTOP)
        with others_run() as turns, pytest.raises(TierError, match="has not answered for 3 s"):
            load(tier, 1)
        assert turns[0] > 10
        store.owners[0].send_signal(signal.SIGCONT)
        services.wait_until(lambda: works(tier), "the owner is used again")
        assert load(tier, 1) in (None, payload(1))


def test_a_client_that_is_ended_takes_no_segment_along(store: MooncakeStore) -> None:
    store.owners[0].kill()
    with opened(store, MEGABYTES, segment="64MiB") as tier:
        services.wait_until(lambda: works(tier), "the tier's own segment is used", 60)
        tier.put(key(1), payload(1, MEGABYTES.chunk_bytes))
        client_of(tier).kill()
        services.wait_until(lambda: works(tier), "another client", 60)
        assert load(tier, 1, MEGABYTES.chunk_bytes) == payload(1, MEGABYTES.chunk_bytes)


def test_the_client_ends_with_the_process_that_started_it(store: MooncakeStore) -> None:
    program = (
        "import os, sys\n"
        "from tests.faults.test_tier_mooncake import *\n"
        "store = MooncakeStore(Path(), *map(int, sys.argv[1:4]))\n"
        "with opened(store) as tier:\n"
        "    tier.put(key(1), payload(1))\n"
        "    print(client_of(tier).pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    ports = [str(port) for port in (store.port, store.metadata_port, store.metrics_port)]
    run = subprocess.run([sys.executable, "-c", program, *ports], capture_output=True, text=True, timeout=120)
    assert run.returncode == -signal.SIGKILL, run.stderr
    services.wait_until(lambda: not psutil.pid_exists(int(run.stdout)), "the end of the client")


def test_the_store_evicts_when_it_is_full(store: MooncakeStore) -> None:
    size = MEGABYTES.chunk_bytes
    with opened(store, MEGABYTES) as tier:

        def put(number: int) -> bool:
            try:
                tier.put(key(number), payload(number, size))
            except TierFull:
                return False
            return True

        for number in range(30):
            services.wait_until(lambda number=number: put(number), "room", 60)
        found = [load(tier, number, size) for number in range(30)]
        assert all(chunk in (None, payload(number, size)) for number, chunk in enumerate(found))
        assert found[29] is not None and None in found
        assert tier.contains([key(number) for number in range(30)]) == [chunk is not None for chunk in found]


def test_instances_share_without_a_copy_and_outlive_a_pause(
    store: MooncakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.master is not None
    given = {"mooncake_master": store.address, "mooncake_metadata": store.metadata, "mooncake_hostname": LOCAL}
    patient = {"lookup_deadline": 15, "load_deadline": 15, "mooncake_timeout": 2}
    one, two = (Instance(settings(**given, **patient, host_capacity=16 * CHUNK_BYTES)) for _ in range(2))
    for tokens in PROMPTS:
        one.serve(tokens)
    slab = two.workers[0]._slab
    with two.workers[0]._tiers["mooncake"]._tier._client.connected() as process:
        assert process.region(slab.view(slab.num_slots - 1)) is not None, "the client knows the host's slots"
    assert two.serve(PROMPTS[-1]).sources == {"mooncake": 48}
    assert two.metric("failure_causes_total", operation="stage", tier="mooncake", cause="corrupt") == 0
    store.master.send_signal(signal.SIGSTOP)
    for seed in range(8):
        assert one.serve(prompt(100 + seed, 50), settle=False).loaded == 0
        assert one.serve(prompt(100 + seed, 50), settle=False).sources == {"host": 48}, "host memory serves on"
    services.wait_until(lambda: opened_breaker(one), "the tier is left alone", 60)
    store.master.send_signal(signal.SIGCONT)
    services.wait_until(lambda: shares(one, two), "the tier is used again", 120)
    for instance in (one, two):
        instance.settle()
        instance.scheduler.directory.check()
        instance.close()


_seeds = iter(range(1000, 100_000))


def opened_breaker(instance: Instance) -> bool:
    instance.serve(prompt(next(_seeds), 50), settle=False)
    return instance.metric("breaker_open", tier="mooncake", direction="write") == 1


def shares(one: Instance, two: Instance) -> bool:
    tokens = prompt(next(_seeds), 50)
    one.serve(tokens)
    return two.serve(tokens).sources == {"mooncake": 48}


@pytest.fixture
def config(store: MooncakeStore) -> dict[str, object]:
    return {"master": store.address, "metadata": store.metadata, "hostname": LOCAL, "timeout": 3.0}


def refused(values: dict[str, object], *, left_out: bool) -> str:
    """The warning when a tier of these settings is opened; strict settings raise it as an error."""
    strict = CacheConfig.model_validate({"mooncake": values, "strict": True})
    with pytest.raises(TierError) as raised:
        open_tiers(strict, SCOPE, 1)
    tiers, warnings = open_tiers(CacheConfig.model_validate({"mooncake": values}), SCOPE, 1)
    assert ("mooncake" not in tiers) == left_out
    for tier in tiers.values():
        tier.close()
    assert len(warnings) == 1 and "\n" not in warnings[0] and "running without it" in warnings[0]
    assert warnings[0].startswith(str(raised.value)[:40])
    return warnings[0]


def test_a_master_of_another_version(store: MooncakeStore, config: dict[str, object]) -> None:
    """A proxy changes the version that the real master answers."""
    with services.proxy(store.port) as front:
        front.to_client = lambda data: data.replace(b"\x052.0.0", b"\x051.9.0")
        said = refused(config | {"master": f"{LOCAL}:{front.port}"}, left_out=False)
    assert "Version mismatch: server=1.9.0 client=2.0.0; install the client of the master's version" in said


def test_a_server_that_is_no_master(store: MooncakeStore, config: dict[str, object]) -> None:
    assert "cannot connect" in refused(config | {"master": f"{LOCAL}:{store.metadata_port}"}, left_out=False)


def test_a_segment_larger_than_memory(config: dict[str, object]) -> None:
    assert "mooncake.segment: 1.0 PiB is more than the" in refused(config | {"segment": "1024TiB"}, left_out=True)


def test_a_machine_without_the_client(config: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake.importlib.util, "find_spec", lambda _: None)
    assert "install lmc-kv[mooncake]" in refused(config, left_out=True)


def test_a_machine_without_the_libraries(
    config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that cannot be imported stands for a machine where the libraries are not installed."""
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").write_text("")
    (tmp_path / "mooncake" / "store.py").write_text("raise ImportError('libibverbs.so.1: cannot open shared object')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert "libibverbs.so.1: cannot open shared object; install libibverbs1" in refused(config, left_out=False)


def test_rdma_without_a_device(config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "_RDMA_DEVICES", tmp_path / "infiniband")
    assert "has no RDMA device" in refused(config | {"protocol": "rdma"}, left_out=True)


@pytest.mark.parametrize("address", ["cache", "http://cache:50051", "cache:0", "cache:99999", ":50051"])
def test_an_address_that_cannot_be_right(address: str) -> None:
    with pytest.raises(ConfigError, match=r"mooncake\.master must be HOST:PORT"):
        check_tiers(CacheConfig.model_validate({"mooncake": {"master": address}}))
