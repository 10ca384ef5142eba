"""What the connector costs vLLM's scheduler thread: python -m benchmarks.scheduler [--out reports/scheduler].

The connector's scheduler half with vLLM's own Request and SchedulerOutput objects, without an engine: the calls that vLLM makes for a
request from its first lookup to its end, in vLLM's order, with the reports that a worker would send. Times are CPU time of the thread.
Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.connectors.vllm.messages import StepReport
from lmc.report import Column, Section, Table, print_table, report_markdown, to_json, write_file
from lmc.report import Report as Page
from tests.engines.scheduler_side import DrivenSide

PROMPT = 2_000
SLOTS = 20_000  # of the host; half of them are taken before the measurement
REQUEST_BAR_US, IDLE_BAR_US = 200.0, 5.0
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


def timed(work: Callable[[], object], rounds: int, repeated: int = 1) -> list[float]:
    """Microseconds of CPU time per call."""
    seconds = []
    for _ in range(rounds):
        started = time.thread_time()
        for _ in range(repeated):
            work()
        seconds.append((time.thread_time() - started) / repeated)
    return [value * 1e6 for value in seconds]


def whole_life(driven: DrivenSide, request: Request) -> float:
    """Microseconds of all calls for a request; what vLLM and the worker do between them is not counted."""
    side = driven.side
    started = time.thread_time()
    found, _ = side.lookup(request, 0)
    assert found is not None
    side.admit(request, driven.blocks, found)
    side.sources(request, found)
    seconds = time.thread_time() - started
    request.num_computed_tokens = found
    output = driven.output({request.request_id: PROMPT - found})
    started = time.thread_time()
    plan = side.step(output).plan
    seconds += time.thread_time() - started
    report = driven.report_of(plan)
    started = time.thread_time()
    side.learn(StepReport(report))
    side.finish(request)
    return (seconds + time.thread_time() - started) * 1e6


def measure(block_tokens: int, rounds: int) -> list[Outcome]:
    bench = DrivenSide(block_tokens, slots=SLOTS)
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
            values.append(whole_life(bench, bench.request([1_000_000 + number, *tokens[1:]])))
    waiting = bench.request([1_000_000, *tokens[1:]])
    again = timed(lambda: bench.side.lookup(waiting, 0), rounds)
    bench.side.finish(waiting)
    empty = bench.output({})
    resting = timed(lambda: idle(bench, empty), rounds, STEPS)
    running = [bench.request([2_000_000 + number, *tokens[1:]]) for number in range(32)]
    for request in running:
        bench.admit(request)
    decode = bench.output({request.request_id: 1 for request in running})
    decoding = timed(lambda: idle(bench, decode), rounds, STEPS)
    bench.scheduler.directory.check()
    return [
        outcome(f"new request of {PROMPT:,} tokens, nothing stored: all calls to its end", fresh, REQUEST_BAR_US),
        outcome(f"new request of {PROMPT:,} tokens, all stored: all calls to its end", known, REQUEST_BAR_US),
        outcome("a request that waits is asked again", again, None),
        outcome("idle step", resting, IDLE_BAR_US),
        outcome("step of 32 requests that decode", decoding, None),
    ]


def as_page(outcomes: list[Outcome], rounds: int) -> Page:
    columns = [Column("case"), Column("tokens per block")]
    columns += [Column("median", "us"), Column("99th percentile", "us"), Column("bar", "us", 0), Column("reached")]
    table = Table(
        "Scheduler thread",
        columns,
        [[one.name, one.block_tokens, one.median_us, one.p99_us, one.bar_us, one.reached] for one in outcomes],
        f"{rounds} rounds; CPU time of one thread. The host tier holds 10,000 chunks.",
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
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    outcomes = [one for block_tokens in (16, 128) for one in measure(block_tokens, options.rounds)]
    page = as_page(outcomes, options.rounds)
    print_table(page.sections[0].items[0])
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(page))
        write_file(options.out / "results.json", to_json({"outcomes": outcomes, "metadata": page.metadata}))
    return int(not all(one.reached for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
