"""How close each tier comes to bare I/O of the same bytes: python -m benchmarks.tiers [--chunk 4MiB] [--out reports/tiers].

Tier and bare I/O take turns chunk by chunk, so that both see the same machine; times are medians over all chunks and rounds, and a ratio
compares the tier with the bare way that is fastest by median. Exit code 1 when a bar is missed.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import obstore

from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.config import RedisConfig, S3Config
from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.base import Tier
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import HEADER_BYTES, TierScope
from lmc.cache.tiers.redis import RedisTier
from lmc.cache.tiers.s3 import S3Tier
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file
from lmc.units import format_size, parse_size
from tests import services

_CONNECTIONS = (
    4  # to Redis, each way: the kernel tunes each one's buffers by itself, which alone makes a difference of a third
)

Step = Callable[[int], object]  # does the chunk of that number


@dataclass(frozen=True)
class Contest:
    """A tier's way with a chunk, and the bare ways to move the same bytes."""

    name: str
    bar: float | None
    tier: Step
    bare: dict[str, Step]
    before: Step = lambda _: None  # not timed


@dataclass(frozen=True)
class Outcome:
    name: str
    bar: float | None
    chunk_bytes: int
    bare_name: str
    seconds: dict[str, list[float]]  # quartiles of each way, over all chunks and rounds

    @property
    def ratio(self) -> float:
        return self.seconds[self.bare_name][1] / self.seconds["tier"][1]

    @property
    def reached(self) -> bool:
        return self.bar is None or self.ratio >= self.bar

    def gb_per_s(self, name: str) -> float:
        return self.chunk_bytes / self.seconds[name][1] / 1e9


@dataclass
class Chunks:
    """The same chunks for every contest: keys, a source and a destination slab, both touched."""

    keys: list[ChunkKey]
    source: list[memoryview]
    slots: list[memoryview]
    room: memoryview  # header and payload of one chunk, for bare loops


def make_chunks(count: int, chunk_bytes: int) -> Chunks:
    pitch = -(-chunk_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    source, target = (memoryview(mmap.mmap(-1, count * pitch)) for _ in range(2))
    for start in range(0, count * pitch, pitch):
        source[start : start + pitch] = os.urandom(pitch)
        target[start : start + pitch] = bytes(pitch)
    cut = [slice(start, start + chunk_bytes) for start in range(0, count * pitch, pitch)]
    room = memoryview(mmap.mmap(-1, HEADER_BYTES + pitch))
    room[:] = bytes(len(room))
    keys = [ChunkKey(os.urandom(32)) for _ in range(count)]
    return Chunks(keys, [source[one] for one in cut], [target[one] for one in cut], room)


def store(tier: Tier, chunks: Chunks) -> Step:
    return lambda number: tier.put(chunks.keys[number], chunks.source[number])


def load(tier: Tier, chunks: Chunks) -> Step:
    return lambda number: tier.get(chunks.keys[number], chunks.slots[number])


def store_all(tier: Tier, chunks: Chunks) -> None:
    for key, data in zip(chunks.keys, chunks.source, strict=True):
        tier.put(key, data)


def run(contest: Contest, chunks: Chunks, rounds: int) -> Outcome:
    ways = {"tier": contest.tier} | contest.bare
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    count = len(chunks.keys)
    for turn in range((rounds + 1) * count):
        order = random.sample(names, len(names))  # one way may leave the caches, or the processor, to others
        for place, name in enumerate(order):
            number = (
                turn + place * count // len(names)
            ) % count  # not what another way has just brought into the CPU's cache
            contest.before(number)
            started = time.perf_counter()
            ways[name](number)
            if turn >= count:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    quartiles = {name: statistics.quantiles(seconds[name], n=4) for name in names}
    best = min(contest.bare, key=lambda name: quartiles[name][1])
    return Outcome(contest.name, contest.bar, len(chunks.source[0]), best, quartiles)


def disk_contests(folder: Path, scope: TierScope, chunks: Chunks) -> Iterator[Contest]:
    tier = DiskTier(folder, scope)
    store_all(tier, chunks)
    files = [tier._file(key) for key in chunks.keys]
    wanted = HEADER_BYTES + scope.chunk_bytes
    padded = -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE

    def drop(number: int) -> None:
        fd = os.open(files[number], os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def read(flags: int) -> Step:
        def step(number: int) -> None:
            whole_pages = wanted % mmap.PAGESIZE == 0
            parts = [chunks.room[:HEADER_BYTES], chunks.slots[number]] if whole_pages else [chunks.room[:padded]]
            fd = os.open(files[number], os.O_RDONLY | flags)
            done = os.preadv(fd, parts, 0)
            os.close(fd)
            assert done == wanted

        return step

    def write(number: int) -> None:
        temporary = folder / "bare.tmp"
        fd = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        written = os.writev(fd, [chunks.room[:HEADER_BYTES], chunks.source[number]])
        assert written == wanted
        os.fsync(fd)
        os.close(fd)
        temporary.rename(folder / f"bare{number}")
        parent = os.open(folder, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)

    bare = {"buffered read": read(0), "O_DIRECT read": read(os.O_DIRECT)}
    for number in range(len(files)):
        read(0)(number)
    yield Contest("disk load, in page cache", 0.85, load(tier, chunks), bare)
    yield Contest("disk load, not in page cache", 0.85, load(tier, chunks), bare, drop)
    yield Contest("disk store, synced", None, store(tier, chunks), {"write, fsync, rename": write})


def redis_contests(port: int, scope: TierScope, chunks: Chunks) -> Iterator[Contest]:
    settings = RedisConfig(url=f"redis://{services.LOCAL}:{port}", timeout=30.0)
    tiers = [RedisTier(settings, scope) for _ in range(_CONNECTIONS)]
    store_all(tiers[0], chunks)
    names = [tiers[0]._name(key) for key in chunks.keys]
    wanted = HEADER_BYTES + scope.chunk_bytes
    around = len(b"$%d\r\n" % wanted) + 2
    buffer = memoryview(bytearray(wanted + around))
    connections = [socket.create_connection((services.LOCAL, port)) for _ in tiers]

    def receive(number: int) -> None:
        name, connection = names[number], connections[number % _CONNECTIONS]
        connection.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(name), name))
        got = 0
        while got < len(buffer):
            got += connection.recv_into(buffer[got:])

    def send(number: int) -> None:
        name, connection = names[number], connections[number % _CONNECTIONS]
        start = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, wanted)
        header = chunks.room[:HEADER_BYTES]
        parts = [memoryview(start), header, chunks.source[number], memoryview(b"\r\n")]
        while parts:
            sent = connection.sendmsg(parts)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = parts[0][sent:]
        answer = connection.recv(64)
        assert answer == b"+OK\r\n", answer

    def tier_load(number: int) -> None:
        tiers[number % _CONNECTIONS].get(chunks.keys[number], chunks.slots[number])

    def tier_store(number: int) -> None:
        tiers[number % _CONNECTIONS].put(chunks.keys[number], chunks.source[number])

    yield Contest("redis load", 0.85, tier_load, {"recv_into": receive})
    yield Contest("redis store", 0.85, tier_store, {"sendmsg": send})
    for opened in (*connections, *tiers):
        opened.close()


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


def contests(folder: Path, scope: TierScope, chunks: Chunks, stack: ExitStack) -> Iterator[Contest]:
    yield from disk_contests(folder, scope, chunks)
    server = stack.enter_context(services.redis_server(folder))
    yield from redis_contests(server.port, scope, chunks)
    yield from s3_contests(stack.enter_context(s3_process()), scope, chunks)


def as_report(outcomes: list[Outcome], chunks: Chunks, rounds: int) -> Report:
    columns = [
        Column("case"),
        Column("tier", "GB/s"),
        Column("fastest bare way"),
        Column("bare", "GB/s"),
        Column("tier/bare"),
        Column("bar"),
        Column("reached"),
    ]
    rows = [
        [
            one.name,
            one.gb_per_s("tier"),
            one.bare_name,
            one.gb_per_s(one.bare_name),
            one.ratio,
            one.bar,
            one.reached,
        ]
        for one in outcomes
    ]
    size = format_size(len(chunks.source[0]))
    note = f"{len(chunks.keys)} chunks of {size}, one thread, {rounds} rounds; medians."
    summary = (
        "Speed of each tier against bare I/O of the same bytes in the same run. "
        "The tier also computes or checks a checksum of every byte. That hides behind a disk; to a load from the page cache, "
        "which is a copy at memory speed, it adds, and the more the faster the memory is."
    )
    metadata = (
        {"command": "python -m benchmarks.tiers " + " ".join(sys.argv[1:])} | describe_hardware() | describe_software()
    )
    return Report(
        "Tiers against bare I/O", summary, [Section("Ratios", "", [Table("Tiers", columns, rows, note)])], metadata
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chunk", default="4MiB", help="size of a chunk")
    parser.add_argument("--count", type=int, default=24, help="chunks per round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--folder", type=Path, help="where the disk tier is tried; default: the system's temporary folder"
    )
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    chunks = make_chunks(options.count, parse_size(options.chunk))
    scope = TierScope("benchmark", 0, "benchmark", len(chunks.source[0]))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ExitStack() as stack:
        outcomes = [run(contest, chunks, options.rounds) for contest in contests(Path(folder), scope, chunks, stack)]
    report = as_report(outcomes, chunks, options.rounds)
    print_table(report.sections[0].items[0])
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(report))
        write_file(options.out / "results.json", to_json({"outcomes": outcomes, "metadata": report.metadata}))
    return 0 if all(one.reached for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
