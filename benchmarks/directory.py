"""Speed and memory of the directory: python -m benchmarks.directory [--out reports/directory].

Prompts are lists of Python ints, as engines hand them over. Times are medians of CPU time: nothing here waits, so a busy machine doesn't
blur them. Memory is what the process grows by. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from blake3 import blake3

from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.directory import Capacity, Directory, Ticket
from lmc.cache.keys import ChunkKey, KeyChain, Namespace, root
from lmc.cache.policy.registry import get_policy
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file

CHUNK_TOKENS = 256
LONG, SHORT = 131_072, 2_000
START = root(Namespace("benchmark", "model", "", "bf16", "layout", CHUNK_TOKENS))


@dataclass(frozen=True)
class Outcome:
    name: str
    value: float
    unit: str
    bar: float | None

    @property
    def reached(self) -> bool:
        return self.bar is None or self.value <= self.bar


def median(step: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.thread_time()
        step()
        seconds.append(time.thread_time() - started)
    return statistics.median(seconds)


def complete(directory: Directory, tickets: list[Ticket]) -> None:
    for ticket in [*tickets, *directory.take_tickets()]:
        directory.complete(ticket.operation, None, 0.0)


def speed(rounds: int) -> list[Outcome]:
    generator = random.Random(1)
    tokens = [generator.randrange(150_000) for _ in range(LONG)]
    short = [generator.randrange(150_000) for _ in range(SHORT)]
    directory = Directory(100_000, {"disk": Capacity.of_chunks(200_000)}, get_policy("lru"))
    chain, small = KeyChain(START, CHUNK_TOKENS), KeyChain(START, CHUNK_TOKENS)
    for keys in (chain.extend(tokens), small.extend(short)):
        complete(directory, directory.store(keys, 0.0))
        complete(directory, [])

    def look_up() -> None:
        found = directory.lookup(KeyChain(START, CHUNK_TOKENS).extend(tokens), 0.0)
        assert found.num_chunks == LONG // CHUNK_TOKENS

    def look_up_again() -> None:
        assert directory.lookup(small.extend(short), 0.0).num_chunks == SHORT // CHUNK_TOKENS

    def live() -> None:
        """What a request of that size costs from its lookup to its end."""
        keys = KeyChain(START, CHUNK_TOKENS).extend(tokens)
        directory.lookup(keys, 0.0)
        complete(directory, directory.load(keys))
        directory.store(keys, 0.0)

    return [
        Outcome(f"hash and look up {LONG:,} tokens, all hits", median(look_up, rounds) * 1e3, "ms", 2.0),
        Outcome(f"look up {SHORT:,} tokens again", median(look_up_again, rounds * 10) * 1e6, "us", 50.0),
        Outcome(f"hash, look up, load and touch {LONG:,} tokens", median(live, rounds) * 1e3, "ms", None),
    ]


def fill(directory: Directory, first: int, count: int, length: int = 64) -> None:
    """Store `count` chunks in prompts of `length` chunks, and let all that follows from it happen."""
    for start in range(first, first + count, length):
        keys = [ChunkKey(blake3(b"%d" % number).digest()) for number in range(start, start + length)]
        complete(directory, directory.store(keys, 0.0))
        while tickets := directory.take_tickets():
            complete(directory, tickets)


def memory(chunks: int, with_disk: bool, cycles: int) -> tuple[float, float]:
    """Bytes per resident chunk when all places are taken, and bytes that `cycles` further stores add. Run in a fresh process."""
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    host = chunks // 4 if with_disk else chunks
    directory = Directory(host, {"disk": Capacity.of_chunks(chunks)} if with_disk else {}, get_policy("lru"))
    fill(directory, 0, chunks)
    held = directory.usage()["disk" if with_disk else "host"][0]
    gc.collect()
    per_chunk = (process.memory_info().rss - before) / held
    fill(directory, chunks, chunks * 2)  # the memory of misses and all free lists have their size now
    gc.collect()
    full = process.memory_info().rss
    fill(directory, chunks * 3, cycles)
    gc.collect()
    growth = process.memory_info().rss - full
    directory.check()
    return per_chunk, float(growth)


def measure(rounds: int, chunks: int, cycles: int) -> list[Outcome]:
    outcomes = speed(rounds)
    context = multiprocessing.get_context("spawn")
    for with_disk in (False, True):
        where = "host and disk" if with_disk else "host"
        with context.Pool(1) as pool:
            per_chunk, growth = pool.apply(memory, (chunks, with_disk, cycles))
        outcomes.append(Outcome(f"memory of {chunks:,} chunks in {where}", per_chunk, "bytes/chunk", 200.0))
        outcomes.append(Outcome(f"growth over {cycles:,} stores and evictions, {where}", growth / 2**20, "MiB", 1.0))
    return outcomes


def as_report(outcomes: list[Outcome]) -> Report:
    columns = [Column("case"), Column("measured"), Column("unit"), Column("bar"), Column("reached")]
    rows = [[one.name, round(one.value, 3), one.unit, one.bar, one.reached] for one in outcomes]
    table = Table(
        "Directory", columns, rows, "Medians of one thread's CPU time; memory is resident memory of a fresh process."
    )
    command = "python -m benchmarks.directory " + " ".join(sys.argv[1:])
    metadata = {"command": command} | describe_hardware() | describe_software()
    return Report(
        "Directory", "What the scheduler's thread pays for the cache.", [Section("Bars", "", [table])], metadata
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--chunks", type=int, default=200_000)
    parser.add_argument("--cycles", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    outcomes = measure(options.rounds, options.chunks, options.cycles)
    report = as_report(outcomes)
    print_table(report.sections[0].items[0])
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(report))
        write_file(options.out / "results.json", to_json({"outcomes": outcomes, "metadata": report.metadata}))
    return 0 if all(one.reached for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
