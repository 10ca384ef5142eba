"""Mixed traffic on a real engine for a long time: is memory flat, do the hits come that the simulator predicts, is anything left over?

    python -m benchmarks.soak --minutes 60 --out reports/soak

Two users in a closed loop send conversations of three workloads, prompts that nobody sent before, and requests that they give up. The host
tier holds a part of the conversations and the disk tier not all of them, so both evict all the time. Every ten seconds the memory of every
process is read. Prompts have a few lengths only: vLLM on a CPU grows with each new one, with or without lmc (it seems to keep
matrix kernels for it). At the end the engine's own record is replayed through the simulator with the same
settings, and the cache is cleared: a pin, a slot or a copy that was lost on the way would show. Exits with 1 when one of the bounds is
missed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import psutil

from benchmarks.soak_report import GIVEN_UP, Left, Sample, Soak, judge, write_soak
from lmc.bench.arms import Launcher, Server
from lmc.bench.client import Outcome, Target, complete, new_session
from lmc.bench.counters import read_counters
from lmc.bench.outputs import TIE_LOGPROB
from lmc.bench.prompts import Conversation, Request, build_prompts, random_tokens
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.workload import Arm, Engine, load_workload
from lmc.cache.settings import load_settings
from lmc.model import EMBEDDED, resolve_model
from lmc.sim.formats import read_trace
from lmc.sim.replay_show import replay_settings
from lmc.units import parse_size

WORKLOADS = ("document-qa", "function-calling", "multi-turn-chat")
LONGEST = 1400  # tokens of a prompt
STEP, REST = 128, 37  # lengths of prompts: whole steps and a rest
CONTEXT = 2048
OUTPUT_TOKENS = 8
EVERY_S = 10.0
USERS = 2
CACHE = {"host": {"capacity": "384MiB"}, "disk": {"path": "{disk}", "capacity": "1GiB"}}
RANDOM_SHARE, ABORTED_SHARE = 0.15, 0.1
TIMEOUT_S = 1800.0


@dataclass
class Traffic:
    """What the users send; the same seed sends the same."""

    tokenizer: ModelTokenizer
    sessions: list[Conversation]
    seed: int

    def requests(self, user: int) -> Iterator[tuple[Request, bool]]:
        """Without end: each request, and whether it is given up before its answer is complete."""
        choose = random.Random(f"{self.seed}/{user}")
        number = 0
        while True:
            if choose.random() < RANDOM_SHARE:
                number += 1
                length = few_lengths(choose.randrange(200, LONGEST))
                prompt = random_tokens(self.tokenizer, length, self.seed, "fresh", user, number)
                session = [Request("fresh", number, 0, prompt, OUTPUT_TOKENS)]
            else:
                session = choose.choice(self.sessions)
            for request in session:
                yield request, choose.random() < ABORTED_SHARE


@dataclass
class Run:
    """One engine under traffic."""

    server: Server
    disk: Path
    target: Target
    began_s: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    first: dict[bytes, Outcome] = field(default_factory=dict)  # by prompt
    compared: int = 0
    ties: int = 0
    differences: list[str] = field(default_factory=list)

    async def send(self, http: aiohttp.ClientSession, request: Request, number: int, give_up_s: float | None) -> None:
        try:
            sending = complete(http, self.target, request, f"soak/{number}", time.perf_counter())
            outcome = await asyncio.wait_for(sending, give_up_s)
        except TimeoutError:
            self.statuses[GIVEN_UP] += 1
            return
        self.statuses[f"{outcome.status} {outcome.cause}".strip()] += 1
        if outcome.ok:
            self._compare(request, outcome)

    def _compare(self, request: Request, outcome: Outcome) -> None:
        """Greedy tokens of a prompt that was answered before are the same again, unless the two best lay too close."""
        reference = self.first.setdefault(request.prompt.tobytes(), outcome)
        if reference is outcome:
            return
        self.compared += 1
        for place, (token, wanted) in enumerate(zip(outcome.tokens, reference.tokens, strict=True)):
            if token != wanted:
                if reference.gaps[place] < TIE_LOGPROB:
                    self.ties += 1
                else:
                    self.differences.append(f"{request.id}: token {place} is {token}, it was {wanted}")
                return

    async def use(self, user: int, traffic: Traffic, think_s: float, end: float) -> None:
        wait = random.Random(f"{traffic.seed}/wait/{user}")
        async with new_session(self.target) as http:
            for number, (request, given_up) in enumerate(traffic.requests(user)):
                await asyncio.sleep(wait.expovariate(1 / think_s))
                if time.monotonic() > end:
                    return
                await self.send(http, request, number * USERS + user, wait.uniform(0.05, 3) if given_up else None)

    async def watch(self, end: float) -> None:
        async with aiohttp.ClientSession() as http:
            while time.monotonic() < end:
                self.samples.append(await self.sample(http))
                await asyncio.sleep(EVERY_S)

    async def sample(self, http: aiohttp.ClientSession) -> Sample:
        assert self.server.process is not None
        root = psutil.Process(self.server.process.pid)
        processes = [process for process in (root, *root.children(recursive=True)) if process.is_running()]
        memory: Counter[str] = Counter()
        for process in processes:
            memory[_role(process)] += process.memory_info().rss
        stats = await self.stats(http)
        return Sample(
            at_s=time.monotonic() - self.began_s,
            requests=sum(self.statuses.values()),
            rss_bytes=dict(memory),
            threads=sum(process.num_threads() for process in processes),
            files=sum(process.num_fds() for process in processes),
            disk_bytes=_bytes_of(self.disk),
            chunks={tier: place["chunks"] for tier, place in stats["tiers"].items()},
            pins=stats["pins"],
            pending=stats["pending_operations"],
        )

    async def stats(self, http: aiohttp.ClientSession) -> dict:  # type: ignore[type-arg]  # JSON of /stats
        if "metrics" not in self.server.ready:  # the engine runs without the cache
            return {"tiers": {}, "pins": 0, "pending_operations": 0, "totals": {}}
        async with http.get(self.server.ready["metrics"].replace("/metrics", "/stats")) as response:
            found: dict = await response.json()  # type: ignore[type-arg]
            return found

    async def left_over(self, traffic: Traffic) -> Left:
        """Wait until nothing is pending, clear the cache, and look."""
        async with aiohttp.ClientSession() as http, new_session(self.target) as client:
            for _ in range(600):
                if not (await self.stats(http))["pending_operations"]:
                    break
                await asyncio.sleep(0.1)
            before = await self.sample(http)
            clear = self.server.ready["metrics"].replace("/metrics", "/clear")
            async with http.post(clear, json={}) as response:
                assert response.status in (200, 202), await response.text()
            short = random_tokens(traffic.tokenizer, 20, traffic.seed, "end")
            await complete(client, self.target, Request("end", 0, 0, short, 2), "soak/end", time.perf_counter())
            await asyncio.sleep(2)
            after = await self.sample(http)
            counters = await read_counters(http, [self.server.root_url + "/metrics"])
        return Left(
            pending=before.pending,
            pins=before.pins,
            chunks=after.chunks,
            disk_bytes=after.disk_bytes,
            running=int(counters.total("vllm:num_requests_running") or 0),
            waiting=int(counters.total("vllm:num_requests_waiting") or 0),
            kv_usage=counters.total("vllm:kv_cache_usage_perc") or 0.0,
        )


def few_lengths(length: int) -> int:
    """The largest of the prompts' lengths that is not above this one."""
    return (length - REST) // STEP * STEP + REST


def _role(process: psutil.Process) -> str:
    """vLLM names its processes; the API server and lmc's own are told apart by their command."""
    words = process.cmdline()
    line = " ".join(words[:4])
    for mark in ("VLLM::EngineCore", "VLLM::Worker"):
        if mark in line:
            return mark.removeprefix("VLLM::")
    return "API server" if "api_server" in line else "lmc serve" if "lmc" in line else "others"


def _bytes_of(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # evicted between the listing and the look
            continue
    return total


def make_traffic(model: Path, seed: int) -> Traffic:
    tokenizer = ModelTokenizer.load(model)
    folder = Path(__file__).parents[1] / "workloads"
    sessions: list[Conversation] = []
    for name in WORKLOADS:
        prompts = build_prompts(load_workload(folder / f"{name}.yaml"), tokenizer, folder)
        for session in prompts.sessions:
            turns = [turn for turn in session if STEP <= len(turn.prompt) <= LONGEST]
            sessions.append([replace(turn, prompt=turn.prompt[: few_lengths(len(turn.prompt))]) for turn in turns])
    return Traffic(tokenizer, [session for session in sessions if session], seed)


async def soak(minutes: float, think_s: float, model: str, seed: int, scratch: Path, cached: bool) -> Soak:
    traffic = make_traffic(resolve_model(model), seed)
    record = scratch / "record.jsonl"
    engine = Engine(
        context=CONTEXT,
        args=["--enforce-eager", "--dtype", "float32", "--no-enable-prefix-caching"],
        env={"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    arm = Arm(cache={**CACHE, "record": str(record)} if cached else None)
    launcher = Launcher(model, engine, scratch)
    async with launcher.started("soak", arm) as (server,):
        run = Run(server, launcher.disk_folder("soak", arm), Target(server.base_url, server.model, TIMEOUT_S))
        end = run.began_s + minutes * 60
        async with asyncio.TaskGroup() as group:
            group.create_task(run.watch(end))
            for user in range(USERS):
                group.create_task(run.use(user, traffic, think_s, end))
        left = await run.left_over(traffic) if cached else None
        async with aiohttp.ClientSession() as http:
            counts = (await run.stats(http))["totals"]
    result = Soak(
        samples=run.samples,
        left=left,
        statuses=dict(run.statuses),
        compared=run.compared,
        ties=run.ties,
        differences=run.differences,
        counts=counts,
        disk_capacity=parse_size(CACHE["disk"]["capacity"]),
    )
    if not cached:
        return result
    trace = read_trace(record)
    predicted = replay_settings(trace, load_settings(scratch / "soak" / "cache.yaml").config)
    return replace(
        result,
        prompt_tokens=int(trace.input_tokens.sum()),
        measured_hits=dict(trace.recorded_hits),
        predicted_hits={tier: int(tokens.sum()) for tier, tokens in predicted.hit_tokens.items()},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--think", type=float, default=3.0, help="mean pause of a user between two requests, seconds")
    parser.add_argument(
        "--without-cache", action="store_true", help="the same traffic on the bare engine, to compare with"
    )
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="keep logs, record and disk tier here")
    parser.add_argument("--out", type=Path, default=Path("reports/soak"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lmc-soak-") as folder:
        scratch, cached = options.scratch or Path(folder), not options.without_cache
        result = asyncio.run(soak(options.minutes, options.think, options.model, options.seed, scratch, cached))
    command = f"python -m benchmarks.soak --minutes {options.minutes:g}" + ("" if cached else " --without-cache")
    write_soak(result, options.out, command)
    return 0 if all(bound.met for bound in judge(result)) else 1


if __name__ == "__main__":
    sys.exit(main())
