"""How close each tier comes to bare I/O of the same bytes: python -m benchmarks.tiers [--chunk 4MiB] [--out reports/tiers] [--only redis
--only mooncake].

Every way moves the same chunks, those of one prefix, in one go, and the ways take turns, so that all see the same machine. A tier does it
as the cache does, on as many threads as io_threads or redis.connections says by default, and on one thread; so does bare I/O. Times are
medians over the rounds. The bar holds for the cache's way and for one thread, both against the fastest bare loop on one. Exit code 1 when a
bar is missed.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import obstore

from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.config import CacheConfig
from lmc.cache.keys import ChunkKey
from lmc.cache.sections import MooncakeConfig, RedisConfig, S3Config
from lmc.cache.tiers.base import Tier
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import FOOTER_BYTES, TierScope, derive_auth_key, stored_bytes
from lmc.cache.tiers.lent import LentMemory
from lmc.cache.tiers.mooncake import MooncakeTier
from lmc.cache.tiers.redis import RedisTier
from lmc.cache.tiers.s3 import S3Tier
from lmc.cache.worker.tier_copies import yield_to_the_engine
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file
from lmc.units import format_size, parse_size
from tests import services

IO_THREADS: int = CacheConfig.model_fields["io_threads"].default
# To Redis, each way: the kernel tunes each one's buffers by itself, which alone makes a difference of a third.
CONNECTIONS: int = RedisConfig.model_fields["connections"].default

Step = Callable[[int], object]  # does the chunk of that number


@dataclass(frozen=True)
class Contest:
    """A tier's way with a chunk, and the bare ways to move the same bytes. Steps of different numbers may run at the same time."""

    name: str
    bar: float | None
    tier: Step
    bare: dict[str, Step]
    before: Step = lambda _: None  # not timed
    threads: int = IO_THREADS  # of the cache
    writes: bool = False  # on threads of low priority, as the cache's writers are


@dataclass(frozen=True)
class Outcome:
    name: str
    bar: float | None
    num_bytes: int  # of all chunks together
    bare_name: str  # of the fastest bare loop
    threads: int  # of the cache
    seconds: dict[str, dict[int, list[float]]]  # way -> threads -> quartiles over the rounds

    def ratio(self, threads: int, bare_threads: int = 1) -> float:
        """Speed of the tier on so many threads, of the speed of the bare way."""
        return self.seconds[self.bare_name][bare_threads][1] / self.seconds["tier"][threads][1]

    @property
    def reached(self) -> bool:
        return self.bar is None or min(self.ratio(1), self.ratio(self.threads)) >= self.bar

    def gb_per_s(self, name: str, threads: int) -> float:
        return self.num_bytes / self.seconds[name][threads][1] / 1e9


@dataclass
class Chunks:
    """The same chunks for every contest: keys, a source and a destination slab, and a page for each one's footer, all touched."""

    keys: list[ChunkKey]
    source: list[memoryview]
    slots: list[memoryview]
    footers: list[memoryview]


def make_chunks(count: int, chunk_bytes: int) -> Chunks:
    """chunk_bytes: whole pages, so that a slot is aligned as O_DIRECT wants it."""
    source, target = (memoryview(mmap.mmap(-1, count * chunk_bytes)) for _ in range(2))
    cut = [slice(start, start + chunk_bytes) for start in range(0, count * chunk_bytes, chunk_bytes)]
    for one in cut:
        source[one] = os.urandom(chunk_bytes)
        target[one] = bytes(chunk_bytes)
    pages = memoryview(mmap.mmap(-1, count * FOOTER_BYTES))
    pages[:] = bytes(len(pages))
    footers = [pages[start : start + FOOTER_BYTES] for start in range(0, len(pages), FOOTER_BYTES)]
    keys = [ChunkKey(os.urandom(32)) for _ in range(count)]
    return Chunks(keys, [source[one] for one in cut], [target[one] for one in cut], footers)


def store_chunk(tier: Tier, chunks: Chunks) -> Step:
    return lambda number: tier.put(chunks.keys[number], chunks.source[number])


def load(tier: Tier, chunks: Chunks) -> Step:
    return lambda number: tier.get(chunks.keys[number], chunks.slots[number])


def store_all(tier: Tier, chunks: Chunks) -> None:
    for key, data in zip(chunks.keys, chunks.source, strict=True):
        tier.put(key, data)


def go(step: Step, count: int, pool: ThreadPoolExecutor, threads: int) -> None:
    """All chunks, each thread every so manyth of them."""

    def some(first: int) -> None:
        for number in range(first, count, threads):
            step(number)

    if threads == 1:
        some(0)
    else:
        list(pool.map(some, range(threads)))


def run(contest: Contest, chunks: Chunks, rounds: int) -> Outcome:
    with ThreadPoolExecutor(contest.threads, initializer=yield_to_the_engine if contest.writes else None) as pool:
        return run_in(pool, contest, chunks, rounds)


def run_in(pool: ThreadPoolExecutor, contest: Contest, chunks: Chunks, rounds: int) -> Outcome:
    steps = {"tier": contest.tier} | contest.bare
    ways = [(name, threads) for name in steps for threads in (1, contest.threads)]
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    count = len(chunks.keys)
    for turn in range(rounds + 1):
        for name, threads in random.sample(
            ways, len(ways)
        ):  # one way may leave the caches, or the processor, to others
            for number in range(count):
                contest.before(number)
            started = time.perf_counter()
            go(steps[name], count, pool, threads)
            if turn:  # the first round warms up
                seconds[name, threads].append(time.perf_counter() - started)
    quartiles: dict[str, dict[int, list[float]]] = {name: {} for name in steps}
    for name, threads in ways:
        quartiles[name][threads] = statistics.quantiles(seconds[name, threads], n=4)
    best = min(contest.bare, key=lambda name: quartiles[name][1][1])
    return Outcome(contest.name, contest.bar, sum(map(len, chunks.source)), best, contest.threads, quartiles)


def disk_contests(folder: Path, scope: TierScope, chunks: Chunks) -> Iterator[Contest]:
    tier = DiskTier(folder, scope)
    store_all(tier, chunks)
    files = [Path(tier._file_name(key)) for key in chunks.keys]
    wanted = FOOTER_BYTES + scope.chunk_bytes

    def drop(number: int) -> None:
        fd = os.open(files[number], os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def read(flags: int) -> Step:
        def step(number: int) -> None:
            fd = os.open(files[number], os.O_RDONLY | flags)
            done = os.preadv(fd, [chunks.slots[number], chunks.footers[number]], 0)
            os.close(fd)
            assert done == wanted

        return step

    def write(number: int) -> None:
        temporary = folder / f"bare{number}.tmp"
        fd = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        written = os.writev(fd, [chunks.source[number], chunks.footers[number]])
        assert written == wanted
        os.fsync(fd)
        os.close(fd)
        temporary.rename(folder / f"bare{number}")
        parent = os.open(folder, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)

    for number in range(len(files)):
        read(0)(number)
    yield Contest("disk load, in page cache", 0.85, load(tier, chunks), {"buffered read": read(0)})
    bare = {"buffered read": read(0), "O_DIRECT read": read(os.O_DIRECT)}
    yield Contest("disk load, not in page cache", 0.85, load(tier, chunks), bare, drop)
    yield Contest("disk store, synced", None, store_chunk(tier, chunks), {"write, fsync, rename": write}, writes=True)
    sealed = DiskTier(folder, replace(scope, namespace="sealed", auth_key=derive_auth_key("benchmark")))
    store_all(sealed, chunks)
    files = [Path(sealed._file_name(key)) for key in chunks.keys]
    for number in range(len(files)):
        read(0)(number)
    yield Contest("disk load, in page cache, with auth_key", None, load(sealed, chunks), {"buffered read": read(0)})
    yield Contest("disk load, not in page cache, with auth_key", None, load(sealed, chunks), bare, drop)
    yield Contest(
        "disk store, synced, with auth_key",
        None,
        store_chunk(sealed, chunks),
        {"write, fsync, rename": write},
        writes=True,
    )


def redis_contests(port: int, scope: TierScope, chunks: Chunks) -> Iterator[Contest]:
    settings = RedisConfig(url=f"redis://{services.LOCAL}:{port}", timeout=30.0)
    tiers = [RedisTier(settings, scope) for _ in range(CONNECTIONS)]
    store_all(tiers[0], chunks)
    names = [tiers[0]._name(key) for key in chunks.keys]
    wanted = FOOTER_BYTES + scope.chunk_bytes
    around = len(b"$%d\r\n" % wanted) + 2
    buffers = [memoryview(bytearray(wanted + around)) for _ in tiers]
    connections = [socket.create_connection((services.LOCAL, port)) for _ in tiers]

    def receive(number: int) -> None:
        name, connection = names[number], connections[number % CONNECTIONS]
        connection.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(name), name))
        buffer = buffers[number % CONNECTIONS]
        got = 0
        while got < len(buffer):
            got += connection.recv_into(buffer[got:])

    def send(number: int) -> None:
        name, connection = names[number], connections[number % CONNECTIONS]
        start = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, wanted)
        parts = [memoryview(start), chunks.source[number], chunks.footers[number], memoryview(b"\r\n")]
        while parts:
            sent = connection.sendmsg(parts)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = parts[0][sent:]
        answer = connection.recv(64)
        assert answer == b"+OK\r\n", answer

    def tier_load(number: int) -> None:
        tiers[number % CONNECTIONS].get(chunks.keys[number], chunks.slots[number])

    def tier_store(number: int) -> None:
        tiers[number % CONNECTIONS].put(chunks.keys[number], chunks.source[number])

    yield Contest("redis load", 0.85, tier_load, {"recv_into": receive}, threads=CONNECTIONS)
    yield Contest("redis store", 0.85, tier_store, {"sendmsg": send}, threads=CONNECTIONS, writes=True)
    key = derive_auth_key("benchmark")
    sealed = [RedisTier(settings, replace(scope, auth_key=key)) for _ in range(CONNECTIONS)]
    store_all(sealed[0], chunks)

    def sealed_load(number: int) -> None:
        sealed[number % CONNECTIONS].get(chunks.keys[number], chunks.slots[number])

    def sealed_store(number: int) -> None:
        sealed[number % CONNECTIONS].put(chunks.keys[number], chunks.source[number])

    yield Contest("redis load, with auth_key", None, sealed_load, {"recv_into": receive}, threads=CONNECTIONS)
    yield Contest("redis store, with auth_key", None, sealed_store, {"sendmsg": send}, threads=CONNECTIONS, writes=True)
    for connection in connections:
        connection.close()
    for tier in (*tiers, *sealed):
        tier.close()


def s3_contests(endpoint: str, scope: TierScope, chunks: Chunks) -> Iterator[Contest]:
    settings = {"endpoint": endpoint, "access_key_id": "id", "secret_access_key": "secret", "timeout": 30}
    tier = S3Tier(S3Config.model_validate({"bucket": "chunks"} | settings), scope)
    store_all(tier, chunks)
    names = [tier._name(key) for key in chunks.keys]
    bare = {"the client's GET": lambda number: obstore.get(tier._store, names[number]).bytes()}
    yield Contest("s3 load", 0.80, load(tier, chunks), bare)


@contextmanager
def s3_process() -> Iterator[str]:
    """An S3 server in a process of its own, so that it shares no interpreter lock with what is measured."""
    port = services.free_port()
    endpoint = f"http://{services.LOCAL}:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", services.LOCAL, "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            services.wait_until(lambda: _put_bucket(endpoint), "the S3 server", 60)
            yield endpoint
        finally:
            process.terminate()


def _put_bucket(endpoint: str) -> bool:
    with suppress(OSError):
        request = urllib.request.Request(f"{endpoint}/chunks", method="PUT")
        urllib.request.urlopen(request, timeout=5).close()
        return True
    return False


def mooncake_contests(store: services.MooncakeStore, scope: TierScope, chunks: Chunks) -> Iterator[Contest]:
    """Another process has the memory, as another machine would. The bare client runs in this process, on memory that it has registered."""
    from mooncake.store import MooncakeDistributedStore

    size, count = scope.chunk_bytes, len(chunks.keys)
    stride = stored_bytes(size)
    settings = {"master": store.address, "metadata": store.metadata, "hostname": services.LOCAL, "timeout": 30}
    tier = MooncakeTier(MooncakeConfig.model_validate(settings), scope)
    descriptor = os.memfd_create("slots")
    os.ftruncate(descriptor, 2 * count * size)
    slab = memoryview(mmap.mmap(descriptor, 2 * count * size))
    cut = [slab[start : start + size] for start in range(0, len(slab), size)]
    lent = replace(chunks, source=cut[:count], slots=cut[count:])
    for slot, data in zip(cut, chunks.source * 2, strict=True):
        slot[:] = data
    tier.lend(LentMemory(descriptor, np.frombuffer(slab, np.uint8).ctypes.data, len(slab), slab))
    client = MooncakeDistributedStore()
    assert client.setup(services.LOCAL, store.metadata, 0, 0, "tcp", "", store.address) == 0
    own = np.frombuffer(mmap.mmap(-1, 2 * count * stride), np.uint8)
    own[:] = np.tile(np.frombuffer(os.urandom(stride), np.uint8), 2 * count)
    base = own.ctypes.data
    assert client.register_buffer(base, len(own)) == 0
    names = [f"bare{number}" for number in range(count)]

    def bare_store(number: int) -> None:
        assert client.batch_put_from([names[number]], [base + number * stride], [stride]) == [0]

    def bare_load(number: int) -> None:
        assert client.batch_get_into([names[number]], [base + (count + number) * stride], [stride]) == [stride]

    def remove(number: int) -> None:
        """A key that is there is not stored again."""
        client.batch_remove([names[number], tier._name(chunks.keys[number])], True)

    stores = {"batch_put_from": bare_store}
    yield Contest("mooncake store", 0.80, store_chunk(tier, lent), stores, remove, writes=True)
    for number in range(count):
        remove(number)
        bare_store(number)
    store_all(tier, lent)
    yield Contest("mooncake load", 0.80, load(tier, lent), {"batch_get_into": bare_load})
    tier.close()
    client.close()
    os.close(descriptor)


TIERS = ("disk", "redis", "s3", "mooncake")


def contests(
    folder: Path, scope: TierScope, chunks: Chunks, stack: ExitStack, only: Sequence[str]
) -> Iterator[Contest]:
    if "disk" in only:
        yield from disk_contests(folder, scope, chunks)
    if "redis" in only:
        server = stack.enter_context(services.redis_server(folder))
        yield from redis_contests(server.port, scope, chunks)
    if "s3" in only:
        yield from s3_contests(stack.enter_context(s3_process()), scope, chunks)
    if "mooncake" in only:
        room = (
            4 * len(chunks.keys) * stored_bytes(scope.chunk_bytes)
        )  # twice what is stored, so that nothing is evicted
        store = stack.enter_context(services.mooncake_store(folder, max(room, 64 << 20), lease="60s"))
        yield from mooncake_contests(store, scope, chunks)


def as_report(outcomes: list[Outcome], chunks: Chunks, rounds: int) -> Report:
    ways = [
        Column("case"),
        Column("fastest bare way"),
        Column("bare loop", "GB/s"),
        Column("bare, the cache's threads", "GB/s"),
        Column("tier, one thread", "GB/s"),
        Column("tier, the cache's threads", "GB/s"),
    ]
    speeds: list[list[str | int | float | None]] = [
        [
            one.name,
            one.bare_name,
            *(one.gb_per_s(name, threads) for name in (one.bare_name, "tier") for threads in (1, one.threads)),
        ]
        for one in outcomes
    ]
    compared = [
        Column("case"),
        Column("the cache's threads"),
        Column("the cache's way / bare loop"),
        Column("bar"),
        Column("reached"),
        Column("one thread each"),
        Column("the cache's threads each"),
    ]
    ratios: list[list[str | int | float | None]] = [
        [
            one.name,
            one.threads,
            one.ratio(one.threads),
            one.bar,
            one.reached,
            one.ratio(1),
            one.ratio(one.threads, one.threads),
        ]
        for one in outcomes
    ]
    size = format_size(len(chunks.source[0]))
    note = f"{len(chunks.keys)} chunks of {size} in one go, {rounds} rounds; medians."
    summary = (
        "Speed of each tier against bare I/O of the same bytes in the same run. The cache moves a prefix on several threads (io_threads, "
        "redis.connections); bare I/O is a plain loop over the same chunks. The tier also computes or checks a checksum of every byte, "
        "and takes some time of the interpreter for each chunk. That hides behind a disk; on as many threads as the bare way, it adds to "
        "a copy at memory speed, and the more the faster the memory is."
    )
    tables = [Table("Tiers and bare I/O", compared, ratios, note), Table("Speeds", ways, speeds, note)]
    metadata = (
        {"command": "python -m benchmarks.tiers " + " ".join(sys.argv[1:])} | describe_hardware() | describe_software()
    )
    return Report("Tiers against bare I/O", summary, [Section("Results", "", tables)], metadata)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chunk", default="4MiB", help="size of a chunk")
    parser.add_argument("--count", type=int, default=24, help="chunks per round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--folder", type=Path, help="where the disk tier is tried; default: the system's temporary folder"
    )
    parser.add_argument("--only", action="append", choices=TIERS, help="this tier; repeat it for several; default: all")
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    chunk_bytes = parse_size(options.chunk)
    if chunk_bytes % mmap.PAGESIZE:
        parser.error(f"--chunk {options.chunk} is not a whole number of pages of {mmap.PAGESIZE} bytes")
    chunks = make_chunks(options.count, chunk_bytes)
    scope = TierScope("benchmark", 0, "benchmark", len(chunks.source[0]))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ExitStack() as stack:
        tried = contests(Path(folder), scope, chunks, stack, options.only or TIERS)
        outcomes = [run(contest, chunks, options.rounds) for contest in tried]
    report = as_report(outcomes, chunks, options.rounds)
    for item in report.sections[0].items:
        if isinstance(item, Table):
            print_table(item)
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(report))
        write_file(options.out / "results.json", to_json({"outcomes": outcomes, "metadata": report.metadata}))
    return 0 if all(one.reached for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
