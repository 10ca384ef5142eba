"""kill -9 of engines and of the node, in traffic: python -m benchmarks.node_faults [--engines 200] [--nodes 50] [--out reports/NAME].

Two client processes without an engine serve prompts from one `lmc node` and check every byte that they load. In each round one of them is
killed at a random moment and replaced; then the node itself is killed and started again. After each part nothing may be left: no open
copy, no pin, no session of the dead. A wrong byte, a client that ends, a hang or a leak is exit code 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lmc.bench.machine import describe_hardware, describe_software
from lmc.errors import RunError
from lmc.report import Column, Section, Table, print_table, report_markdown, to_json, write_file
from lmc.report import Report as Page
from tests.cache.node.client import serve_forever

PATIENCE = 60.0  # seconds, on a loaded machine
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.cache.node.client"])


@dataclass(frozen=True)
class Outcome:
    part: str
    rounds: int
    served: int
    hits: int
    left: int
    median_back_s: float


class Client:
    """It serves on by itself until it is killed."""

    def __init__(self, path: Path, seed: int) -> None:
        self._counts = _context.Array("q", 2)
        self.process = _context.Process(target=serve_forever, args=(path, seed, self._counts), daemon=True)
        self.process.start()

    @property
    def served(self) -> int:
        return int(self._counts[0])

    @property
    def hits(self) -> int:
        return int(self._counts[1])

    def wait(self, served: int = 0, hits: int = 0) -> None:
        """Until so many more. Raises RunError if the client has met a wrong byte or a fault, or hangs."""
        served, hits, until = self.served + served, self.hits + hits, time.monotonic() + PATIENCE
        while self.served < served or self.hits < hits:
            self.check()
            if time.monotonic() > until:
                raise RunError(f"a client hangs after {self.served} prompts")
            time.sleep(0.002)

    def check(self) -> None:
        if not self.process.is_alive():
            raise RunError(f"a client ended with {self.process.exitcode}: it met a wrong byte, or a fault")

    def kill(self) -> None:
        self.check()
        self.process.kill()
        self.process.join()


class Node:
    def __init__(self, path: Path) -> None:
        file = path.with_suffix(".yaml")
        file.write_text("chunk_tokens: 8\nhost:\n  capacity: 128KiB\n")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lmc", "node", "--config", str(file), "--socket", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.stats_url = line.strip().rpartition("metrics=")[2].replace("/metrics", "/stats")

    def left(self) -> int:
        """Open copies, pins and sessions of the dead, once all is settled or patience is over."""
        until = time.monotonic() + PATIENCE
        while True:
            with urllib.request.urlopen(self.stats_url, timeout=PATIENCE) as answer:
                stats = json.loads(answer.read())
            left = sum(one["pending_operations"] + one["pins"] for one in stats["namespaces"])
            left += sum(not engine["attached"] for engine in stats["engines"])
            if left == 0 or time.monotonic() > until:
                return int(left)
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def kill_engines(path: Path, rounds: int, chance: random.Random) -> Outcome:
    node = Node(path)
    stays, served, hits = Client(path, 1), 0, 0
    victim = Client(path, 2)
    for number in range(rounds):
        victim.wait(served=1)
        time.sleep(chance.uniform(0.0, 0.1))
        victim.kill()
        served, hits = served + victim.served, hits + victim.hits
        victim = Client(path, 3 + number)
        stays.wait(hits=1)
    for client in (stays, victim):
        client.kill()
    left = node.left()
    node.kill()
    return Outcome("engine killed", rounds, served + stays.served, hits + stays.hits, left, 0.0)


def kill_nodes(path: Path, rounds: int, chance: random.Random) -> Outcome:
    node = Node(path)
    clients = [Client(path, 1), Client(path, 2)]
    back: list[float] = []
    for _ in range(rounds):
        for client in clients:
            client.wait(hits=1)
        time.sleep(chance.uniform(0.0, 0.2))
        node.kill()
        for client in clients:
            client.wait(served=3)
        node = Node(path)
        started = time.monotonic()
        for client in clients:
            client.wait(hits=1)
        back.append(time.monotonic() - started)
    for client in clients:
        client.kill()
    left = node.left()
    node.kill()
    back.sort()
    served, hits = sum(client.served for client in clients), sum(client.hits for client in clients)
    return Outcome("node killed", rounds, served, hits, left, back[len(back) // 2])


def summary(outcomes: Sequence[Outcome]) -> str:
    return f"Left behind in {sum(one.rounds for one in outcomes)} rounds: {sum(one.left for one in outcomes)}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    chance = random.Random(7)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "node.sock"
        if options.engines:
            outcomes.append(kill_engines(path, options.engines, chance))
        if options.nodes:
            outcomes.append(kill_nodes(path, options.nodes, chance))
    columns = [Column("part"), Column("rounds"), Column("prompts served"), Column("with a hit"), Column("left behind")]
    columns.append(Column("first hit after the node's return, median", "s"))
    rows = [list(asdict(one).values()) for one in outcomes]
    table = Table(
        "Rounds of kill -9", columns, rows, "Every loaded byte was checked; a wrong one would have ended the run."
    )
    print_table(table)
    if options.out is not None:
        metadata = {"command": "python -m benchmarks.node_faults " + " ".join(sys.argv[1:])}
        metadata |= describe_hardware() | describe_software()
        page = Page(
            "kill -9 of engines and of the node", summary(outcomes), [Section("Results", "", [table])], metadata
        )
        write_file(options.out / "report.md", report_markdown(page))
        write_file(options.out / "results.json", to_json({"outcomes": outcomes, "metadata": metadata}))
    return int(any(one.left for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
