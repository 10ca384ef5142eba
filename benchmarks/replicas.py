"""What the benchmarks of several engines share: prompts, the engines' settings, answers without the cache, and the comparison with them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from lmc.bench.arms import Server
from lmc.bench.client import Outcome, Target, complete
from lmc.bench.outputs import compare_outputs
from lmc.bench.prompts import Request, build_prompts
from lmc.bench.records import OutputCheck, to_record
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.workload import Engine, load_workload
from lmc.errors import RunError

WORKLOAD = Path(__file__).parents[1] / "workloads" / "function-calling.yaml"
ENGINE = Engine(
    context=2048,
    args=["--enforce-eager", "--dtype", "float32", "--no-enable-prefix-caching"],
    env={"VLLM_CPU_KVCACHE_SPACE": "1"},
)
BYPASS = {"kv_transfer_params": {"lmc": {"bypass": True}}}


def tool_prompts(model: Path, groups: int, per_group: int, longest: int, output_tokens: int) -> list[Request]:
    """Questions to assistants with a list of tools; those of a group share the list."""
    workload = load_workload(WORKLOAD)
    part = workload.parts["tools"]
    pick = part.pick.model_copy(update={"groups": groups, "per_group": per_group, "max_prompt_tokens": longest})
    part = part.model_copy(update={"pick": pick, "output_tokens": output_tokens})
    workload = workload.model_copy(update={"parts": {"tools": part}, "engine": ENGINE})
    prompts = build_prompts(workload, ModelTokenizer.load(model), WORKLOAD.parent)
    return [request for session in prompts.sessions for request in session]


async def computed(http: aiohttp.ClientSession, server: Server, request: Request) -> Outcome:
    """The answer without the cache. Raises RunError when there is none, or when it used the cache."""
    target = Target(server.base_url, server.model, extra=BYPASS)
    outcome = await complete(http, target, request, f"computed/{request.id}", time.perf_counter())
    if not outcome.ok or outcome.cached_tokens:
        raise RunError(
            f"{request.id} was not computed: {outcome.status} {outcome.cause}, {outcome.cached_tokens} cached"
        )
    return outcome


def check_answers(answers: Sequence[Outcome], wanted: Sequence[Outcome]) -> OutputCheck:
    """Each answer against the one without the cache. Raises RunError when there is none to compare with."""
    check = compare_outputs(
        "cache",
        [to_record("cache", 0, outcome, None) for outcome in answers],
        "computed",
        [to_record("computed", 0, outcome, None) for outcome in wanted],
    )
    if check.compared_requests != len(answers):
        raise RunError(f"only {check.compared_requests} of {len(answers)} answers could be compared")
    return check
