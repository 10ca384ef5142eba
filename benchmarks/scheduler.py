"""What the connector costs vLLM's scheduler thread: python -m benchmarks.scheduler [--node] [--out reports/scheduler].

The connector's scheduler half with vLLM's own Request and SchedulerOutput objects, without an engine: the calls that vLLM makes for a
request from its first lookup to its end, in vLLM's order, with the reports that a worker would send. Times are CPU time of the thread.
With --node the connector is attached to an `lmc node` in another process, and times are those that the thread takes, waiting included.
Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import random
import secrets
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

import lmc.cache.node.wire as wire
from benchmarks.node_process import node_process
from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.connectors.vllm.messages import StepReport
from lmc.cache.node.channel import Channel, connect
from lmc.report import Column, Section, Table, print_table, report_markdown, to_json, write_file
from lmc.report import Report as Page
from tests.engines.scheduler_side import DrivenSide

PROMPT = 2_000
SLOTS = 20_000  # of the host; half of them are taken before the measurement
REQUEST_BAR_US, IDLE_BAR_US = 200.0, 5.0
NODE_REQUEST_BAR_US, NODE_IDLE_BAR_US = 300.0, 10.0
STEPS = 200  # that are timed as one, since one is shorter than the clock can tell


@dataclass(frozen=True)
class Outcome:
    name: str
    block_tokens: int
    median_us: float
    p99_us: float
    bar_us: float | None

    @property
    def reached(self) -> bool:
        return self.bar_us is None or self.median_us <= self.bar_us


def idle(driven: DrivenSide, output: SchedulerOutput) -> None:
    """What vLLM calls in every step, with nothing to do for lmc."""
    driven.side.step(output)
    driven.side.stats()
    driven.side.take_events()
    _ = driven.side.busy


def timed(work: Callable[[], object], rounds: int, clock: Callable[[], float], repeated: int = 1) -> list[float]:
    """Microseconds per call."""
    seconds = []
    for _ in range(rounds):
        started = clock()
        for _ in range(repeated):
            work()
        seconds.append((clock() - started) / repeated)
    return [value * 1e6 for value in seconds]


def map_memory(node: Path) -> bytes:
    """Stands for a worker that has mapped the node's memory. Returns its number."""
    number = secrets.token_bytes(wire.ID_BYTES)
    channel = connect(str(node), 10.0, takes_descriptor=True)
    channel.ask(wire.TakeMemory(number, 0), 10.0)
    channel.put(wire.Taken())
    _workers.append(channel)
    return number


_workers: list[Channel] = []  # which stay connected


def whole_life(driven: DrivenSide, request: Request, clock: Callable[[], float]) -> float:
    """Microseconds of all calls for a request; what vLLM and the worker do between them is not counted."""
    side = driven.side
    started = clock()
    found, _ = side.lookup(request, 0)
    assert found is not None
    side.admit(request, driven.tables, found)
    side.sources(request, found)
    seconds = clock() - started
    request.num_computed_tokens = found
    output = driven.output({request.request_id: PROMPT - found})
    started = clock()
    plan = side.step(output).plan
    seconds += clock() - started
    report = driven.report_of(plan)
    started = clock()
    side.learn(StepReport(report))
    side.finish(request)
    return (seconds + clock() - started) * 1e6


def measure(block_tokens: int, rounds: int, node: Path | None = None) -> list[Outcome]:
    clock, request_bar, idle_bar = time.thread_time, REQUEST_BAR_US, IDLE_BAR_US
    settings: dict[str, object] = {}
    if node is not None:
        clock, request_bar, idle_bar = time.perf_counter, NODE_REQUEST_BAR_US, NODE_IDLE_BAR_US
        settings = {"node": str(node), "node_deadline": 10.0, "mapping": map_memory(node).hex()}
    bench = DrivenSide(block_tokens, slots=SLOTS, **settings)
    generator = random.Random(1)
    tokens = [generator.randrange(150_000) for _ in range(PROMPT)]
    for number in range(SLOTS // 2 * bench.namespace.chunk_tokens // PROMPT):
        bench.serve(bench.request([number, *tokens[1:]]))
    bench.plans.clear()

    def outcome(name: str, values: list[float], bar: float | None) -> Outcome:
        return Outcome(name, block_tokens, statistics.median(values), statistics.quantiles(values, n=100)[-1], bar)

    fresh: list[float] = []
    known: list[float] = []
    for number in range(rounds):
        for values in (fresh, known):  # the second request finds what the first has stored
            values.append(whole_life(bench, bench.request([1_000_000 + number, *tokens[1:]]), clock))
    waiting = bench.request([1_000_000, *tokens[1:]])
    again = timed(lambda: bench.side.lookup(waiting, 0), rounds, clock)
    bench.side.finish(waiting)
    empty = bench.output({})
    resting = timed(lambda: idle(bench, empty), rounds, clock, STEPS)
    running = [bench.request([2_000_000 + number, *tokens[1:]]) for number in range(32)]
    for request in running:
        bench.admit(request)
    decode = bench.output({request.request_id: 1 for request in running})
    decoding = timed(lambda: idle(bench, decode), rounds, clock, STEPS)
    if node is None:
        bench.scheduler.directory.check()
    bench.side.close()
    return [
        outcome(f"new request of {PROMPT:,} tokens, nothing stored: all calls to its end", fresh, request_bar),
        outcome(f"new request of {PROMPT:,} tokens, all stored: all calls to its end", known, request_bar),
        outcome("a request that waits is asked again", again, None),
        outcome("idle step", resting, idle_bar),
        outcome("step of 32 requests that decode", decoding, None),
    ]


def as_page(outcomes: list[Outcome], rounds: int) -> Page:
    columns = [Column("case"), Column("tokens per block")]
    columns += [Column("median", "us"), Column("99th percentile", "us"), Column("bar", "us", 0), Column("reached")]
    table = Table(
        "Scheduler thread",
        columns,
        [[one.name, one.block_tokens, one.median_us, one.p99_us, one.bar_us, one.reached] for one in outcomes],
        f"{rounds} rounds; time of one thread, with --node waiting included, else its CPU time. The host tier holds 10,000 chunks.",
    )
    command = "python -m benchmarks.scheduler " + " ".join(sys.argv[1:])
    missed = [one.name for one in outcomes if not one.reached]
    summary = f"Bars missed: {'; '.join(missed)}." if missed else "All bars are met."
    return Page(
        "Cost on vLLM's scheduler thread",
        summary,
        [Section("Results", "", [table])],
        {"command": command.strip()} | describe_hardware() | describe_software(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--node", action="store_true", help="attach to an lmc node in another process")
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    if options.node:
        with node_process(SLOTS * 4096) as node:
            outcomes = [one for block_tokens in (16, 128) for one in measure(block_tokens, options.rounds, node)]
    else:
        outcomes = [one for block_tokens in (16, 128) for one in measure(block_tokens, options.rounds)]
    page = as_page(outcomes, options.rounds)
    print_table(page.sections[0].items[0])
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(page))
        write_file(options.out / "results.json", to_json({"outcomes": outcomes, "metadata": page.metadata}))
    return int(not all(one.reached for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
