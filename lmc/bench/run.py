"""Runs a workload: builds the prompts, runs the arms, and compares and judges them."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import uvloop

from lmc.bench.arms import SERVE, Launcher, Probe, fit_together
from lmc.bench.bars import judge_bars
from lmc.bench.expected import expected_by_request, expected_by_tier
from lmc.bench.figures import arm_figures
from lmc.bench.machine import command_line, describe_hardware, describe_software
from lmc.bench.outputs import compare_outputs
from lmc.bench.prediction import predict
from lmc.bench.progress import Progress, Quiet
from lmc.bench.prompts import Prompts, Request, build_prompts, in_words, random_tokens
from lmc.bench.records import SCHEMA_VERSION, ArmResult, Comparison, OutputCheck, RequestRecord, Results, to_record
from lmc.bench.schedule import Plan, make_plan, split
from lmc.bench.stages import ArmData, ArmRun, opened
from lmc.bench.stats import compare, compare_groups, pairs
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.verdict import judged
from lmc.bench.workload import Workload, nearest
from lmc.errors import EngineError, RunError, WorkloadError

WARM_UP_OUTPUT = 4
PROBE_TOKENS = 24
SETTLE_S = 1.5  # vLLM's workers spin on a core for 1 s after their last step, and an arm that takes its turn then misses that core
PROBE_TEXT = 'The KV cache of 2 engines: naïve façade, 100 % {"json": [1, 2.5]}\n\tdéjà vu'


@dataclass(frozen=True)
class RunOptions:
    """`serve` is the command that starts an engine; `keep` keeps the scratch folder with logs and disk tiers."""

    base: Path
    model: str
    model_folder: Path
    arms: Sequence[str] = ()
    repeat: int = 1
    serve: Sequence[str] = SERVE
    scratch: Path | None = None
    progress: Progress = field(default_factory=Quiet)


def run_workload(workload: Workload, options: RunOptions) -> tuple[Results, list[RequestRecord]]:
    """Run every arm and judge it. Raises WorkloadError before an engine starts, RunError or EngineError when the first arm cannot start."""
    tokenizer = ModelTokenizer.load(options.model_folder)
    prompts = build_prompts(workload, tokenizer, options.base)
    chosen = chosen_arms(workload, options.arms)
    with tempfile.TemporaryDirectory(prefix="lmc-bench-") as folder:
        scratch = options.scratch or Path(folder)
        runner = _Runner(workload, options, tokenizer, prompts, chosen, scratch)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            return loop.run(runner.run())


def chosen_arms(workload: Workload, wanted: Sequence[str]) -> list[str]:
    """The wanted arms in the workload's order, all if none is wanted. Raises WorkloadError for an unknown one, or a restarted one alone."""
    known = list(workload.arms)
    for name in wanted:
        if name not in known:
            raise WorkloadError(f"no arm {name!r} in this workload; {nearest(name, known)}")
        base = workload.arms[name].restart_of
        if base is not None and base not in wanted:
            raise WorkloadError(f"arm {name} restarts {base}; choose that arm too")
    return [name for name in known if not wanted or name in wanted]


async def settle() -> None:
    """Wait until the workers of the arm that was measured last are at rest."""
    await asyncio.sleep(SETTLE_S)


@dataclass
class _Runner:
    workload: Workload
    options: RunOptions
    tokenizer: ModelTokenizer
    prompts: Prompts
    arms: list[str]
    scratch: Path
    plan: Plan = field(init=False)
    interleaved: bool = False
    records: dict[str, list[RequestRecord]] = field(default_factory=dict)
    exact: dict[str, bool] = field(default_factory=dict)
    data: dict[str, list[ArmData]] = field(default_factory=dict)  # one per repeat

    async def run(self) -> tuple[Results, list[RequestRecord]]:
        started, began = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        hardware = describe_hardware()
        sessions = [[self._sayable(request) for request in session] for session in self.prompts.sessions]
        self.plan = make_plan(sessions, self.workload)
        problems: list[str] = []
        for repeat in range(self.options.repeat):
            for group in self._groups():
                try:
                    await self._run_together(group, repeat)
                except (EngineError, RunError, aiohttp.ClientError, TimeoutError) as error:
                    if not self.data:
                        raise
                    problems.append(f"arm {', '.join(group)}: {error}")
                    break
            if problems:
                break
        results = self._judge(started, time.perf_counter() - began, hardware, problems)
        return results, [record for name in self.records for record in self.records[name]]

    def _groups(self) -> list[list[str]]:
        """Groups of arms that run at the same time. A restarted arm runs alone, after the arm that it restarts has ended."""
        fresh = [name for name in self.arms if self.workload.arms[name].restart_of is None]
        chosen = [self.workload.arms[name] for name in fresh]
        if self.workload.interleave is None or not fit_together(
            chosen, self.workload.engine, self.options.model_folder
        ):
            return [[name] for name in self.arms]
        self.interleaved = len(fresh) > 1
        return [fresh, *([name] for name in self.arms if name not in fresh)]

    async def _run_together(self, names: Sequence[str], repeat: int) -> None:
        """Start these arms, send each stretch of the load to all of them in ABBA order, and stop them."""
        options, workload = self.options, self.workload
        launcher = Launcher(options.model, workload.engine, self.scratch / str(repeat), options.serve)
        whole = len(self.plan.items)
        size = workload.interleave or whole if len(names) > 1 else whole
        async with AsyncExitStack() as stack:
            runs: list[ArmRun] = []
            for name in names:
                arm = opened(name, workload.arms[name], repeat, launcher, workload.limits.timeout, options.progress)
                runs.append(await stack.enter_async_context(arm))
                await runs[-1].prepare(self._warm_up(name), self._prime(), self._probe(name))
                options.progress.load(name, len(self.plan.items))
            last = runs[-1]
            for index, stretch in enumerate(split(self.plan, size)):
                for run in runs if index % 2 == 0 else runs[::-1]:
                    if run is not last:
                        await settle()
                    await run.measure(stretch, workload.limits)
                    last = run
            for run in runs:
                await run.finish()
        for run in runs:
            self._keep(run.data)

    def _keep(self, data: ArmData) -> None:
        name, arm = data.name, data.arm
        if not data.sent_as_planned:
            arm = arm.model_copy(update={"reuse": "unknown"})
        seen = [item.request for item in self.plan.items] if arm.restart_of else []
        before = [*self._warm_up(name), *self._prime()]
        expected, exact = expected_by_request(arm, self.plan, data.before, seen, before)
        data.expected_by_tier = expected_by_tier(arm, self.plan, data.before, seen, before)
        by_id = dict(zip((item.request.id for item in self.plan.items), expected or [], strict=False))
        self.exact[name] = exact and self.exact.get(name, True)
        self.records.setdefault(name, []).extend(
            to_record(name, data.repeat, outcome, by_id.get(outcome.request.id), data.costs.get(outcome.request.id))
            for outcome in data.outcomes
        )
        self.data.setdefault(name, []).append(data)

    def _sayable(self, request: Request) -> Request:
        """With text and messages, if it may go to a server that takes no tokens."""
        if any(self.workload.arms[name].url for name in self.arms):
            return in_words(request, self.tokenizer)
        return request

    def _probe(self, arm: str) -> Probe:
        tokens = random_tokens(self.tokenizer, PROBE_TOKENS, self.workload.seed, "probe", arm)
        request = self._sayable(Request("probe", 0, 0, tokens, WARM_UP_OUTPUT))
        return Probe(PROBE_TEXT, self.tokenizer.encode(PROBE_TEXT, add_special=False).tolist(), request)

    def _warm_up(self, arm: str) -> list[Request]:
        """Random prompts that are in no part. Each is sent twice, so that the path of a hit is warm as well."""
        wanted = self.workload.warm_up
        seed = self.workload.seed
        prompts = [
            random_tokens(self.tokenizer, wanted.tokens, seed, "warm-up", arm, index)
            for index in range(wanted.requests)
        ]
        return [
            self._sayable(Request("warm-up", index, 0, prompt, WARM_UP_OUTPUT))
            for index, prompt in enumerate(prompts)
            for _ in range(2)
        ]

    def _prime(self) -> list[Request]:
        return [
            self._sayable(request)
            for part in self.workload.prime
            for session in self.prompts.parts[part]
            for request in session
        ]

    def _judge_arm(self, name: str, outputs: OutputCheck | None) -> ArmResult:
        runs, records = self.data[name], self.records[name]
        planned = len(self.plan.items) * len(runs) if self.workload.limits.seconds is None else None
        figures = arm_figures(runs, records, self.workload, self.plan)
        return judged(figures, runs, records, planned, self.exact[name], outputs)

    def _judge(self, started: str, seconds: float, hardware: dict[str, str], problems: list[str]) -> Results:
        names = [name for name in self.arms if name in self.data]
        reference = names[0]
        outputs = [compare_outputs(name, self.records[name], reference, self.records[reference]) for name in names[1:]]
        checks: dict[str, OutputCheck] = {check.arm: check for check in outputs}
        arms = [self._judge_arm(name, checks.get(name)) for name in names]
        comparisons: list[Comparison] = []
        for name in names[1:]:
            matched = pairs(self.records[name], self.records[reference])
            comparisons += compare(name, reference, matched, self.workload.seed, self.plan.is_ordered)
            comparisons += compare_groups(name, reference, matched, self.workload.seed)
        problems = problems + [f"arm {arm.name}: {problem}" for arm in arms for problem in arm.problems]
        return Results(
            schema_version=SCHEMA_VERSION,
            name=self.workload.name,
            valid=not problems,
            problems=problems,
            started=started,
            seconds=seconds,
            interleaved=self.interleaved,
            command=command_line(),
            lmc=describe_software(),
            hardware=hardware,
            model=self.options.model,
            workload=self.workload.model_dump(mode="json", exclude={"quick"}),
            arms=arms,
            outputs=outputs,
            comparisons=comparisons,
            bars=judge_bars(self.workload.bars, self.records, self.workload.seed),
            predictions=predict(self.workload.arms, self.records),
            skipped_too_long=self.prompts.too_long,
        )
