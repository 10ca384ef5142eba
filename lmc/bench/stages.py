"""Runs one arm through its stages: start, verify empty, warm up, prime, drain, measure, drain, stop.

This module collects data; lmc.bench.verdict judges them. Every stage records its duration and a line about what it found.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import aiohttp

from lmc.bench.arms import REACH_S, Launcher, Probe, Server, check_tokenizer
from lmc.bench.attribution import Costs, request_costs, with_span
from lmc.bench.client import Outcome, Target, complete, new_session
from lmc.bench.counters import Counters, add_up, difference, read_counters
from lmc.bench.engine_counters import VLLM_EXTERNAL_HITS, device_hits, looked_up, looked_up_at_start
from lmc.bench.fleet import processes_for, run_in_processes
from lmc.bench.handshake import learn
from lmc.bench.load import Measured, run_load
from lmc.bench.progress import Progress
from lmc.bench.prompts import Request
from lmc.bench.records import HitPoint, Phase
from lmc.bench.schedule import Plan
from lmc.bench.spans import read_spans
from lmc.bench.workload import Arm, Limits
from lmc.errors import RunError

DRAIN_S = 120.0
SHARED_DRAIN_S = 10.0
POLL_S = 0.05
LOOKUPS, HITS = "lmc_lookup_tokens_total", "lmc_hit_tokens_total"


@dataclass
class ArmData:
    """The data of one arm in one repeat. `before` and `after` are the counters before and after the measured load."""

    name: str
    arm: Arm
    repeat: int = 0
    phases: list[Phase] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    command: str = ""
    measured: list[Measured] = field(default_factory=list)
    before: Counters | None = None
    after: Counters | None = None
    timeline: list[HitPoint] = field(default_factory=list)
    costs: dict[str, Costs] = field(default_factory=dict)  # by request id
    expected_by_tier: dict[str, int] | None = None  # hit tokens, as the simulator expects them
    notes: list[str] = field(default_factory=list)  # measurements that the server does not allow
    sent_as_planned: bool = True  # to the token

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for stretch in self.measured for outcome in stretch.outcomes]

    @property
    def wall_s(self) -> float:
        return sum(stretch.wall_s for stretch in self.measured)


@dataclass
class ArmRun:
    """The stages of one arm on ready servers: prepare, measure (once or stretch by stretch), finish."""

    data: ArmData
    servers: list[Server]
    http: aiohttp.ClientSession
    timeout_s: float
    progress: Progress
    last: Counters | None = None  # the newest reading of the counters during the load
    stopped: bool = False
    began_s: float = field(default_factory=time.perf_counter)

    @property
    def targets(self) -> list[Target]:
        return [
            Target(server.base_url, server.model, self.timeout_s, dialect=server.dialect, access=server.access)
            for server in self.servers
        ]

    @property
    def label(self) -> str:
        """The beginning of the id of every measured request."""
        return f"{self.data.name}/{self.data.repeat}"

    async def prepare(self, warm_up: Sequence[Request], prime: Sequence[Request], probe: Probe) -> None:
        """Bring the arm to the start of the load. `warm_up` must share no chunk with the load. Raises RunError if a request of it fails,
        or if the server has another tokenizer."""
        for server in self.servers:
            await check_tokenizer(self.http, server, probe)
        if self.data.arm.url:
            with self._phase("handshake") as said:
                dialect, self.data.notes = await learn(self.http, self.targets[0], probe.request)
                self.data.sent_as_planned = dialect.prompt_ids and not dialect.added_tokens
                self.servers = [replace(server, dialect=dialect) for server in self.servers]
                said.append("; ".join(self.data.notes) or "the server takes everything")
        with self._phase("verify empty") as said:
            said.extend([await _verify_empty(self.http, server, self.data) for server in self.servers])
        with self._phase("warm up") as said:
            said.append(f"{await self._send_all(warm_up)} requests")
        if prime:
            with self._phase("prime") as said:
                said.append(f"{await self._send_all(prime)} requests")
        with self._phase("drain") as said:
            said.append(await self._drain())
        self.data.before = self.last = await _read_all(self.http, self.servers)

    async def measure(self, plan: Plan, limits: Limits) -> None:
        """Send one stretch of load; the next one continues where this one ended."""
        if self.stopped:
            return
        with self._phase("measure") as said:
            processes = limits.processes or processes_for(plan)
            send = run_load if processes == 1 else partial(run_in_processes, processes=processes)
            stretch = await send(
                plan, self.targets, self.label, lambda o: self._on_done(plan, o), limits.seconds, self.data.wall_s
            )
            said.append(f"{len(stretch.outcomes)} requests")
        self.data.measured.append(stretch)

    async def finish(self) -> None:
        """Wait for the stores to end and read the counters. If that fails, the measurements stay and a problem is noted."""
        try:
            with self._phase("drain") as said:
                said.append(await self._drain())
            self.data.after = await _read_all(self.http, self.servers)
            await self._join_spans()
        except (aiohttp.ClientError, RunError) as error:
            self.data.problems.append(await self._why_gone() or f"reading the counters after the load failed: {error}")
        self.progress.phase(self.data.name, "stop")

    async def _join_spans(self) -> None:
        for server in self.servers:
            spans = await read_spans(self.http, server.metrics)
            for stretch in self.data.measured:
                for outcome in stretch.outcomes:
                    span = spans.get(f"{self.label}/{outcome.request.id}")
                    known = self.data.costs.get(outcome.request.id, Costs())
                    self.data.costs[outcome.request.id] = with_span(known, span, outcome, stretch.origin_s)

    async def _on_done(self, plan: Plan, outcome: Outcome) -> bool:
        data, before = self.data, self.data.before
        self.progress.request(data.name, outcome)
        if outcome.status == "disconnected" and (why := await self._why_gone()):
            data.problems.append(why)
            self.stopped = True
        # Between two requests, never beside one: reading counters takes the engine's own time.
        elif plan.is_ordered and outcome.ok and before is not None and self.last is not None:
            try:
                now = await _read_all(self.http, self.servers)
            except aiohttp.ClientError as error:
                data.problems.append(f"the metrics can no longer be read: {error}")
                self.stopped = True
                return False
            data.timeline.append(_hit_point(time.perf_counter() - self.began_s, now, before))
            data.costs[outcome.request.id] = request_costs(now, self.last)
            self.last = now
        return not self.stopped

    @contextmanager
    def _phase(self, name: str) -> Iterator[list[str]]:
        """Times a stage; the body appends its findings to the list."""
        self.progress.phase(self.data.name, name)
        began = time.perf_counter()
        said: list[str] = []
        try:
            yield said
        finally:
            self.data.phases.append(Phase(name, time.perf_counter() - began, "; ".join(said)))

    async def _drain(self) -> str:
        return await _drain(self.http, self.servers, own=self.data.arm.url is None)

    async def _why_gone(self) -> str | None:
        for server in self.servers:
            if why := await server.why_gone():
                return why
        return None

    async def _send_all(self, requests: Sequence[Request]) -> int:
        async with new_session(self.targets[0]) as http:
            for index, (request, target) in enumerate(itertools.product(requests, self.targets)):
                outcome = await complete(http, target, request, f"before/{index}", time.perf_counter())
                if not outcome.ok:
                    raise RunError(f"a request before the load failed: {outcome.status}: {outcome.cause}")
        return len(requests)


@asynccontextmanager
async def opened(
    name: str, arm: Arm, repeat: int, launcher: Launcher, timeout_s: float, progress: Progress
) -> AsyncIterator[ArmRun]:
    """Starts an arm and stops it when the context ends. Raises EngineError when it does not start."""
    data = ArmData(name, arm, repeat)
    progress.phase(name, "start")
    began = time.perf_counter()
    async with launcher.started(name, arm) as servers, servers[0].access.session(REACH_S) as http:
        data.command = servers[0].command
        urls = ", ".join(server.base_url for server in servers)
        data.phases.append(Phase("start", time.perf_counter() - began, urls))
        yield ArmRun(data, servers, http, timeout_s, progress)
    progress.phase(name, "done")


def hits_by_tier(now: Counters, before: Counters) -> dict[str, float]:
    """Hit tokens since `before`: "device" is the engine's own prefix cache, the other names are lmc's tiers.

    Where lmc's own page is not read, and for other connectors, "external" is all that vLLM loaded through its connector.
    """
    tiers = {}
    if (device := device_hits(now, before)) is not None:
        tiers["device"] = device
    own = now.by_label(HITS, "tier")
    for tier in own:
        tiers[tier] = difference(now, before, HITS, tier=tier) or 0.0
    if not own and (external := difference(now, before, VLLM_EXTERNAL_HITS)):
        tiers["external"] = external
    return tiers


def _hit_point(at_s: float, now: Counters, before: Counters) -> HitPoint:
    lookups = difference(now, before, LOOKUPS)
    if lookups is None:
        lookups = looked_up(now, before)
    return HitPoint(at_s, lookups or 0.0, hits_by_tier(now, before))


async def _verify_empty(http: aiohttp.ClientSession, server: Server, data: ArmData) -> str:
    """Check by the counters that the caches are empty. Of a restarted arm the disk must be filled and everything else empty."""
    if data.arm.url:
        return await _reset(http, server, data) if data.arm.reset else "not verified: the server was left as it was"
    counters = await read_counters(http, server.metrics)
    used = counters.by_label("lmc_slots_used", "tier")
    if queried := looked_up_at_start(counters):
        data.problems.append(f"not empty at start: the engine has already looked up {queried:.0f} tokens")
    for tier, slots in used.items():
        may_be_full = data.arm.restart_of is not None and tier not in ("device", "host")
        if slots and not may_be_full:
            data.problems.append(f"not empty at start: tier {tier} holds {slots:.0f} chunks")
    if data.arm.restart_of is not None and not any(slots for tier, slots in used.items() if tier != "host"):
        data.problems.append(f"the disk of {data.arm.restart_of} is empty: no chunk survived the restart")
    return ", ".join(f"{tier} {slots:.0f} chunks" for tier, slots in sorted(used.items())) or "no lmc tiers"


async def _reset(http: aiohttp.ClientSession, server: Server, data: ArmData) -> str:
    """Ask a server that ran before to empty its caches, and say whether it did. SGLang empties its own cache, but not lmc's."""
    headers = server.access.headers
    async with http.post(f"{server.root_url}/flush_cache", headers=headers) as response:
        if response.status == 200:
            return "flushed by request"
    url, asked = f"{server.root_url}/reset_prefix_cache", {"reset_external": "true"}
    async with http.post(url, params=asked, headers=headers) as response:
        if response.status != 200:
            return (
                f"not verified: the server refuses a reset (HTTP {response.status}; vLLM needs VLLM_SERVER_DEV_MODE=1)"
            )
        body = await response.json(content_type=None)
    if isinstance(body, dict) and body.get("success") is False:
        data.problems.append("the server refused to empty its cache, because blocks are in use")
    return "reset by request"


async def _read_all(http: aiohttp.ClientSession, servers: Sequence[Server]) -> Counters:
    return add_up([await read_counters(http, server.metrics) for server in servers])


async def _drain(http: aiohttp.ClientSession, servers: Sequence[Server], own: bool) -> str:
    """Wait until lmc has no pending work. Raises RunError after DRAIN_S, unless others may use the server, too."""
    began = time.perf_counter()
    while True:
        pending = (await _read_all(http, servers)).total("lmc_pending_operations")
        if not pending:
            return "no lmc" if pending is None else "nothing pending"
        if not own and time.perf_counter() - began > SHARED_DRAIN_S:
            return f"{pending:.0f} operations pending, perhaps of others"
        if time.perf_counter() - began > DRAIN_S:
            raise RunError(f"{pending:.0f} operations of the cache are still pending after {DRAIN_S:g} s")
        await asyncio.sleep(POLL_S)
