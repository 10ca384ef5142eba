"""How close each tier comes to bare I/O of the same bytes: python -m benchmarks.tiers [--chunk 4MiB] [--out reports/tiers].

Tier and bare loop take turns within each round, so that both see the same machine; a ratio is the median over the rounds of tier speed
divided by the speed of the fastest bare loop in that round. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import mmap
import os
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

Loop = Callable[[], None]


@dataclass(frozen=True)
class Contest:
    """A tier's loop over all chunks and the bare loops that do the same without a tier."""

    name: str
    bar: float | None
    tier: Loop
    bare: dict[str, Loop]
    before: Loop = lambda: None  # not timed


@dataclass(frozen=True)
class Outcome:
    name: str
    bar: float | None
    tier_gb_per_s: float
    bare_name: str
    bare_gb_per_s: float
    ratio: float
    ratios: list[float]

    @property
    def reached(self) -> bool:
        return self.bar is None or self.ratio >= self.bar


@dataclass
class Chunks:
    """The same chunks for every contest: keys, a source and a destination slab, both touched."""

    keys: list[ChunkKey]
    source: list[memoryview]
    slots: list[memoryview]
    room: memoryview  # header and payload of one chunk, for bare loops

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.source))


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


def store(tier: Tier, chunks: Chunks) -> Loop:
    def loop() -> None:
        for key, data in zip(chunks.keys, chunks.source, strict=True):
            tier.put(key, data)

    return loop


def load(tier: Tier, chunks: Chunks) -> Loop:
    def loop() -> None:
        for key, slot in zip(chunks.keys, chunks.slots, strict=True):
            tier.get(key, slot)

    return loop


def run(contest: Contest, num_bytes: int, rounds: int) -> Outcome:
    loops = {"tier": contest.tier} | contest.bare
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        names = list(loops)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            contest.before()
            started = time.perf_counter()
            loops[name]()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    best = min(contest.bare, key=lambda name: statistics.median(seconds[name]))
    fastest = [min(seconds[name][index] for name in contest.bare) for index in range(rounds)]
    ratios = [bare / tier for bare, tier in zip(fastest, seconds["tier"], strict=True)]
    speed = {name: num_bytes / statistics.median(seconds[name]) / 1e9 for name in loops}
    ratio = statistics.median(ratios)
    return Outcome(
        contest.name, contest.bar, speed["tier"], best, speed[best], ratio, [round(one, 3) for one in ratios]
    )


def disk_contests(folder: Path, scope: TierScope, chunks: Chunks) -> Iterator[Contest]:
    tier = DiskTier(folder, scope)
    store(tier, chunks)()
    files = [tier._file(key) for key in chunks.keys]
    wanted = HEADER_BYTES + scope.chunk_bytes
    padded = -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE

    def drop() -> None:
        for path in files:
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def read(flags: int) -> Loop:
        def loop() -> None:
            page = chunks.room[:HEADER_BYTES]
            for path, slot in zip(files, chunks.slots, strict=True):
                fd = os.open(path, os.O_RDONLY | flags)
                parts = [chunks.room[:padded]] if wanted % mmap.PAGESIZE else [page, slot]
                done = os.preadv(fd, parts, 0)
                assert done == wanted
                os.close(fd)

        return loop

    def write() -> None:
        header = bytes(HEADER_BYTES)
        parent = os.open(folder, os.O_RDONLY)
        for index, data in enumerate(chunks.source):
            temporary, target = folder / "bare.tmp", folder / f"bare{index}"
            fd = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            written = os.writev(fd, [header, data])
            assert written == wanted
            os.fsync(fd)
            os.close(fd)
            temporary.rename(target)
            os.fsync(parent)
        os.close(parent)

    bare = {"buffered": read(0), "O_DIRECT": read(os.O_DIRECT)}
    yield Contest("disk load, in page cache", 0.85, load(tier, chunks), bare, read(0))
    yield Contest("disk load, not in page cache", 0.85, load(tier, chunks), bare, drop)
    yield Contest("disk store, synced", None, store(tier, chunks), {"write, fsync, rename": write})


def redis_contests(port: int, scope: TierScope, chunks: Chunks) -> Iterator[Contest]:
    tier = RedisTier(RedisConfig(url=f"redis://{services.LOCAL}:{port}", timeout=30.0), scope)
    store(tier, chunks)()
    names = [tier._name(key) for key in chunks.keys]
    wanted = HEADER_BYTES + scope.chunk_bytes
    connection = socket.create_connection((services.LOCAL, port))
    header = bytes(HEADER_BYTES)

    def receive() -> None:
        around = len(b"$%d\r\n" % wanted) + 2
        buffer = memoryview(bytearray(wanted + around))
        for name in names:
            connection.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(name), name))
            got = 0
            while got < len(buffer):
                got += connection.recv_into(buffer[got:])

    def send() -> None:
        for name, data in zip(names, chunks.source, strict=True):
            start = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, wanted)
            parts = [memoryview(start), memoryview(header), data, memoryview(b"\r\n")]
            while parts:
                sent = connection.sendmsg(parts)
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if sent:
                    parts[0] = parts[0][sent:]
            answer = connection.recv(64)
            assert answer == b"+OK\r\n", answer

    yield Contest("redis load", 0.85, load(tier, chunks), {"recv_into": receive}, store(tier, chunks))
    yield Contest("redis store", 0.85, store(tier, chunks), {"sendmsg": send})
    connection.close()
    tier.close()


def s3_contests(endpoint: str, scope: TierScope, chunks: Chunks) -> Iterator[Contest]:
    settings = {"endpoint": endpoint, "access_key_id": "id", "secret_access_key": "secret", "timeout": 30}
    tier = S3Tier(S3Config.model_validate({"bucket": "chunks"} | settings), scope)
    store(tier, chunks)()

    def get() -> None:
        for key in chunks.keys:
            obstore.get(tier._store, tier._name(key)).bytes()

    yield Contest("s3 load", 0.80, load(tier, chunks), {"the client's GET": get})


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
        Column("fastest bare loop"),
        Column("bare", "GB/s"),
        Column("tier/bare"),
        Column("lowest"),
        Column("highest"),
        Column("bar"),
        Column("reached"),
    ]
    rows = [
        [
            one.name,
            one.tier_gb_per_s,
            one.bare_name,
            one.bare_gb_per_s,
            one.ratio,
            min(one.ratios),
            max(one.ratios),
            one.bar,
            one.reached,
        ]
        for one in outcomes
    ]
    size = format_size(len(chunks.source[0]))
    note = f"{len(chunks.keys)} chunks of {size} per loop, one thread, {rounds} rounds; medians over rounds."
    summary = (
        "Speed of each tier against bare I/O of the same bytes in the same run. "
        "The tier also computes or checks a checksum of every byte."
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
    parser.add_argument("--count", type=int, default=24, help="chunks per loop")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--folder", type=Path, help="where the disk tier is tried; default: the system's temporary folder"
    )
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    chunks = make_chunks(options.count, parse_size(options.chunk))
    scope = TierScope("benchmark", 0, "benchmark", len(chunks.source[0]))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ExitStack() as stack:
        outcomes = [
            run(contest, chunks.num_bytes, options.rounds) for contest in contests(Path(folder), scope, chunks, stack)
        ]
    report = as_report(outcomes, chunks, options.rounds)
    print_table(report.sections[0].items[0])
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(report))
        write_file(options.out / "results.json", to_json({"outcomes": outcomes, "metadata": report.metadata}))
    return 0 if all(one.reached for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
