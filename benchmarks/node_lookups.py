"""How many lookups a node answers: python -m benchmarks.node_lookups [--clients 8] [--seconds 5] [--out reports/node-lookups].

Client processes without an engine ask one `lmc node` for prompts of 2,000 tokens, half of which are stored, one request after the other:
each exchange begins a request, looks it up and ends the one before. Keys are hashed beforehand, as an engine hashes a prompt once. The node
and its clients share this machine's cores, so the node's own CPU time per lookup is told as well. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

import lmc.cache.node.wire as wire
from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.keys import KeyChain, Namespace, root
from lmc.cache.node.channel import connect
from lmc.cache.node.link import Link
from lmc.report import Column, Section, Table, print_table, report_markdown, to_json, write_file
from lmc.report import Report as Page

TOKENS = 2_000
CHUNK_TOKENS = 128
PROMPTS = 64  # different ones of each client
RATE_BAR, P99_BAR_MS = 20_000, 2.0
_CHUNK_BYTES = 4096


@dataclass(frozen=True)
class Outcome:
    clients: int
    lookups: int
    per_second: float
    median_ms: float
    p99_ms: float
    node_cpu_us: float
    hits: float
    late: int

    @property
    def reached(self) -> bool:
        return self.per_second >= RATE_BAR and self.p99_ms <= P99_BAR_MS


def attach(path: str, number: int) -> Link:
    """As an engine of one rank; the channel of its worker is left to the process."""
    worker = bytes([number]) * wire.ID_BYTES
    channel = connect(path, 10.0, takes_descriptor=True)
    channel.ask(wire.TakeMemory(worker, 0), 10.0)
    channel.put(wire.Taken())
    _kept.append(channel)
    namespace = Namespace("bench", "model", "", "u8", "layout", CHUNK_TOKENS)
    message = wire.Attach(f"client-{number}", namespace, "opaque", _CHUNK_BYTES, [0], [worker], 1, 0.05, 5.0, False)
    link = Link(Path(path), message, 10.0, lambda session, answers: None)
    assert link.wait(30.0)
    return link


_kept: list[object] = []


def prompts(number: int) -> list[bytes]:
    namespace = Namespace("bench", "model", "", "u8", "layout", CHUNK_TOKENS)
    generator = random.Random(number)
    found = []
    for _ in range(PROMPTS):
        tokens = [generator.randrange(150_000) for _ in range(TOKENS)]
        found.append(wire.join(KeyChain(root(namespace), CHUNK_TOKENS).extend(tokens)))
    return found


def fill(link: Link, stored: list[bytes]) -> None:
    """Store prompts; the bytes of their chunks do not matter here."""
    for number, keys in enumerate(stored):
        events = [wire.Begin(number, f"f{number}", "", False), wire.Lookup(number, TOKENS, 0, 0, keys)]
        answers = link.exchange([*events, wire.Store(number, len(keys) // 32, b"", TOKENS, TOKENS)])
        assert answers is not None and isinstance(answers[1], wire.Stores)
        link.tell([wire.Done(operation, "") for operation in answers[1].operations])
        link.tell([wire.End(number, 0.0)])


def client(path: str, number: int, seconds: float, pipe: Connection) -> None:
    link = attach(path, number)
    mine = prompts(number)
    fill(link, mine[: PROMPTS // 2])
    pipe.send("ready")
    pipe.recv()
    times, hits, request = [], 0, PROMPTS
    until = time.perf_counter() + seconds
    while (started := time.perf_counter()) < until:
        request += 1
        events: list[wire.Event] = [
            wire.Begin(request, "r", "", False),
            wire.Lookup(request, TOKENS, 0, 0, mine[request % PROMPTS]),
        ]
        if request > PROMPTS + 1:
            events.insert(0, wire.End(request - 1, 0.0))
        answers = link.exchange(events)
        times.append(time.perf_counter() - started)
        if answers is not None:
            found = answers[0]
            assert isinstance(found, wire.Found)
            hits += found.gain > 0
    pipe.send((times, hits, link.timeouts))
    pipe.recv()


def measure(clients: int, seconds: float) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/node.sock"
        file = Path(folder) / "node.yaml"
        file.write_text("host:\n  capacity: 256MiB\nmetrics:\n  enabled: false\n")
        node = subprocess.Popen(
            [sys.executable, "-m", "lmc", "node", "--config", str(file), "--socket", path],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert node.stdout is not None and node.stdout.readline()
        context = multiprocessing.get_context("spawn")
        pipes, processes = [], []
        for number in range(clients):
            here, there = context.Pipe()
            process = context.Process(target=client, args=(path, number, seconds, there))
            process.start()
            pipes.append(here)
            processes.append(process)
        for pipe in pipes:
            pipe.recv()
        before = sum(psutil.Process(node.pid).cpu_times()[:2])
        for pipe in pipes:
            pipe.send("go")
        results = [pipe.recv() for pipe in pipes]
        spent = sum(psutil.Process(node.pid).cpu_times()[:2]) - before
        for pipe in pipes:
            pipe.send("end")
        for process in processes:
            process.join()
        node.terminate()
        node.wait()
    times = sorted(seconds for one, _, _ in results for seconds in one)
    return Outcome(
        clients,
        len(times),
        len(times) / seconds,
        statistics.median(times) * 1e3,
        times[int(0.99 * len(times))] * 1e3,
        spent / len(times) * 1e6,
        sum(hits for _, hits, _ in results) / len(times),
        sum(late for _, _, late in results),
    )


def as_page(outcomes: list[Outcome]) -> Page:
    columns = [Column("clients"), Column("lookups"), Column("lookups", "1/s"), Column("median", "ms")]
    columns += [Column("99th percentile", "ms"), Column("node's CPU per lookup", "us"), Column("hits"), Column("late")]
    rows = [list(asdict(one).values()) for one in outcomes]
    note = f"Bars: {RATE_BAR:,} lookups a second from 8 clients, 99th percentile {P99_BAR_MS} ms."
    table = Table("Lookups", columns, rows, f"{TOKENS:,} tokens, {CHUNK_TOKENS} per chunk. {note}")
    command = "python -m benchmarks.node_lookups " + " ".join(sys.argv[1:])
    reached = outcomes[-1].reached
    return Page(
        "Lookups that a node answers",
        "The bars are met." if reached else "A bar is missed.",
        [Section("Results", "", [table])],
        {"command": command.strip()} | describe_hardware() | describe_software(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    outcomes = [measure(clients, options.seconds) for clients in sorted({1, options.clients})]
    page = as_page(outcomes)
    print_table(page.sections[0].items[0])
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(page))
        write_file(options.out / "results.json", to_json({"outcomes": outcomes, "metadata": page.metadata}))
    return int(not outcomes[-1].reached)


if __name__ == "__main__":
    sys.exit(main())
