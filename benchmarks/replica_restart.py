"""Two replicas over one Redis, or on one node; one is killed in the middle of traffic, restarted, and takes its share again.

    python -m benchmarks.replica_restart --out reports/replica-restart
    python -m benchmarks.replica_restart --node --out reports/node-restart

A client sends prompts to the replicas in turn, one at a time. What the killed replica had begun, and its share until it is back, goes to
the other one. Over Redis the restarted replica's memory is empty: what it hits comes from Redis. With --node both replicas are attached to
one `lmc node`, whose memory stays warm: the first repeated prompt is a hit in host memory. At the end every prompt is computed once more
by a request that bypasses the cache, and each answer of the run is held against that. Exits with 1 when a request was lost, an answer
differs, or the restarted replica had to compute a prompt that is stored.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import psutil

from benchmarks.replicas import ENGINE, check_answers, computed, tool_prompts
from lmc.bench.arms import Launcher, Server
from lmc.bench.client import Outcome, Target, complete, new_session
from lmc.bench.counters import read_counters
from lmc.bench.machine import describe_hardware, describe_software
from lmc.bench.node_server import started_node
from lmc.bench.prompts import Request
from lmc.bench.records import OutputCheck
from lmc.bench.redis_server import started_redis
from lmc.bench.workload import Arm
from lmc.cache.directory import HOST
from lmc.model import EMBEDDED, resolve_model
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file

GROUPS, QUESTIONS, LONGEST = 3, 2, 1300
OUTPUT_TOKENS = 8
PAUSE_S = 2.0  # between two requests while a replica starts, which needs the processor
SOURCES = {HOST: "the node's memory", "redis": "Redis"}
BEFORE, DOWN, AFTER = "both replicas up", "one replica down", "restarted replica back"


@dataclass(frozen=True)
class Answer:
    phase: str
    replica: str
    failed_over: bool
    outcome: Outcome


@dataclass
class Run:
    http: aiohttp.ClientSession
    prompts: list[Request]
    order: random.Random
    up: dict[str, Server]  # replicas that take traffic
    answers: list[Answer] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    turn: int = 0

    async def send_one(self, phase: str) -> None:
        """The next request to the next replica; to another one if that breaks."""
        request = self.order.choice(self.prompts)
        names = sorted(self.up)
        self.turn += 1
        first = names[self.turn % len(names)]
        for name in (first, *(name for name in names if name != first)):
            outcome = await self._ask(name, request)
            if outcome.ok:
                self.answers.append(Answer(phase, name, name != first, outcome))
                return
            self.up.pop(name, None)
        self.lost.append(f"{request.id}: {outcome.status} {outcome.cause}")

    async def _ask(self, name: str, request: Request) -> Outcome:
        server = self.up[name]
        target = Target(server.base_url, server.model)
        return await complete(self.http, target, request, f"{name}/{self.turn}", time.perf_counter())


@dataclass(frozen=True)
class Result:
    answers: list[Answer]
    lost: list[str]
    down_s: float
    restarted_hits: dict[str, float]  # tokens by tier
    check: OutputCheck
    source: str  # the tier from which the restarted replica gets its first hits


def kill(server: Server) -> None:
    """SIGKILL to every process of the replica."""
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    for process in (root, *root.children(recursive=True)):
        process.kill()


async def run(requests: int, model: str, seed: int, scratch: Path, *, node: bool, groups: int = GROUPS) -> Result:
    prompts = tool_prompts(resolve_model(model), groups, QUESTIONS, LONGEST, OUTPUT_TOKENS)
    async with AsyncExitStack() as stack:
        cache: dict[str, object] = {"host": {"capacity": "1GiB"}}
        if node:
            settings = scratch / "node.yaml"
            settings.write_text("host: {capacity: 1GiB}\n")
            cache["node"] = await stack.enter_async_context(started_node(scratch, settings))
        else:
            cache["redis"] = {"url": await stack.enter_async_context(started_redis(scratch))}
        launcher = Launcher(model, ENGINE, scratch)

        @asynccontextmanager
        async def replica(name: str) -> AsyncIterator[Server]:
            """On a core of its own: a busy replica spins on its cores, and a new one beside it there would not start."""
            core = {"VLLM_CPU_OMP_THREADS_BIND": "0" if name == "a" else "1", "OMP_NUM_THREADS": "1"}
            async with launcher.started(name, Arm(cache=cache, env=core)) as servers:
                yield servers[0]

        up = {name: await stack.enter_async_context(replica(name)) for name in ("a", "b")}
        http = await stack.enter_async_context(new_session(Target(up["a"].base_url, up["a"].model)))
        traffic = Run(http, prompts, random.Random(seed), dict(up))
        for _ in range(requests):
            await traffic.send_one(BEFORE)
        traffic.turn += traffic.turn % 2 + 1  # the next request is b's
        begun = asyncio.create_task(traffic.send_one(DOWN))
        await asyncio.sleep(0.05)
        killed_s = time.perf_counter()
        kill(up["b"])
        await begun
        start = asyncio.create_task(stack.enter_async_context(replica("b-restarted")))
        while not start.done():
            await traffic.send_one(DOWN)
            await asyncio.sleep(PAUSE_S)
        restarted = traffic.up["b-restarted"] = await start
        down_s = time.perf_counter() - killed_s
        for _ in range(requests):
            await traffic.send_one(AFTER)
        counters = await read_counters(http, restarted.metrics)
        wanted = [await computed(http, up["a"], request) for request in prompts]
    check = check_answers([answer.outcome for answer in traffic.answers], wanted)
    hits = counters.by_label("lmc_hit_tokens_total", "tier")
    return Result(traffic.answers, traffic.lost, down_s, hits, check, HOST if node else "redis")


def phases_table(answers: Sequence[Answer]) -> Table:
    rows = []
    for phase in (BEFORE, DOWN, AFTER):
        for replica in ("a", "b", "b-restarted"):
            mine = [answer for answer in answers if (answer.phase, answer.replica) == (phase, replica)]
            if not mine:
                continue
            outcomes = [answer.outcome for answer in mine]
            prompt = sum(len(outcome.request.prompt) for outcome in outcomes)
            hit = sum(outcome.cached_tokens or 0 for outcome in outcomes)
            cold = [outcome for outcome in outcomes if not outcome.cached_tokens]
            ttft = np.median([(outcome.first_s or 0) - outcome.sent_s for outcome in outcomes]) * 1e3
            moved = sum(answer.failed_over for answer in mine)
            rows.append([phase, replica, len(mine), moved, prompt, 100 * hit / prompt, len(cold), float(ttft)])
    columns = [
        Column("phase"), Column("replica"), Column("answered"), Column("taken over"), Column("prompt", "tokens"),
        Column("hits", "% of tokens", 1), Column("without a hit"), Column("TTFT p50", "ms", 0),
    ]  # fmt: skip
    return Table("Traffic", columns, rows, "Taken over: begun on the other replica when that one was killed.")


def verdicts(result: Result) -> list[tuple[str, str, bool]]:
    """(bound, what was found, met)."""
    back = [answer for answer in result.answers if answer.replica == "b-restarted"]
    cold = [answer for answer in back if not answer.outcome.cached_tokens]
    found, source = result.restarted_hits.get(result.source, 0), SOURCES[result.source]
    moved = sum(answer.failed_over for answer in result.answers)
    check = result.check
    compared = f"{check.compared_requests} answers, {check.ties} numerical ties, {len(check.differences)} differences"
    return [
        ("no request is lost", f"{len(result.lost)} lost, {moved} taken over", not result.lost and moved > 0),
        ("every answer is the one without the cache", compared, not check.differences),
        (f"the restarted replica computes no prompt that {source} holds", f"{len(cold)} of {len(back)}", not cold),
        (f"its first hits come from {source}", f"{found:,.0f} tokens", found > 0),
    ]


def as_report(result: Result, command: str) -> Report:
    bounds = [[bound, found, "met" if met else "NOT met"] for bound, found, met in verdicts(result)]
    statuses = Counter(answer.phase for answer in result.answers)
    below = "on one node" if result.source == HOST else "over one Redis"
    summary = (
        f"Two replicas with one core each {below}, one request at a time; one is killed with SIGKILL while it computes. "
        f"It is back after {result.down_s:.0f} s (the start of an engine), in which the other one answers {statuses[DOWN]} requests."
    )
    tiers = ", ".join(f"{tokens:,.0f} tokens from {tier}" for tier, tokens in result.restarted_hits.items())
    sections = [
        Section("Bounds", "", [Table("Bounds", [Column("bound"), Column("found"), Column("verdict")], bounds)]),
        Section("Before, during, after", f"Hits of the restarted replica: {tiers}.", [phases_table(result.answers)]),
    ]
    return Report(
        "One of two replicas restarted",
        summary,
        sections,
        {"command": command} | describe_hardware() | describe_software(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=24, help="before the kill, and again after the restart")
    parser.add_argument(
        "--node", action="store_true", help="attach both to an lmc node, instead of one Redis below them"
    )
    parser.add_argument("--quick", action="store_true", help="few requests: to see that it runs")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="keep logs here")
    parser.add_argument("--out", type=Path, help="default: reports/replica-restart, or reports/node-restart")
    options = parser.parse_args()
    requests, groups = (6, 1) if options.quick else (options.requests, GROUPS)
    out = options.out or Path("reports/node-restart" if options.node else "reports/replica-restart")
    with tempfile.TemporaryDirectory(prefix="lmc-restart-") as folder:
        scratch = options.scratch or Path(folder)
        result = asyncio.run(run(requests, options.model, options.seed, scratch, node=options.node, groups=groups))
    report = as_report(result, " ".join(["python -m benchmarks.replica_restart", *sys.argv[1:]]))
    for section in report.sections:
        for table in section.items:
            assert isinstance(table, Table)
            print_table(table)
    for difference in result.check.differences + result.lost:
        print(difference, file=sys.stderr)
    write_file(out / "report.md", report_markdown(report))
    rows = [
        {"phase": one.phase, "replica": one.replica, "failed_over": one.failed_over, "request": one.outcome.request.id,
         "ttft_s": (one.outcome.first_s or 0) - one.outcome.sent_s, "cached_tokens": one.outcome.cached_tokens}
        for one in result.answers
    ]  # fmt: skip
    shown = {
        "answers": rows,
        "down_s": result.down_s,
        "restarted_hits": result.restarted_hits,
        "bounds": verdicts(result),
    }
    write_file(out / "results.json", to_json(shown))
    return 0 if all(met for _, _, met in verdicts(result)) else 1


if __name__ == "__main__":
    sys.exit(main())
