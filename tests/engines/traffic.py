"""Random traffic inside a vLLM engine's process: requests come, wait, are preempted and aborted, copies fail, caches are reset.

Deterministic in what it does (one seed), not in when: copies in the background have their own time.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

NO_PROGRESS_SECONDS = 120.0


@dataclass
class Chances:
    """Probabilities, per request or per step or per copy."""

    abort: float = 0.0
    reset: float = 0.0
    reset_running: float = 0.0  # of a reset: that it preempts what runs
    failed_load: float = 0.0
    failed_store: float = 0.0
    slow_load: float = 0.0


@dataclass
class Tally:
    """What happened, to be shown beside the comparison."""

    steps: int = 0
    aborted: int = 0
    resets: int = 0
    failed_loads: int = 0
    failed_stores: int = 0
    concurrency: int = 0  # most requests at a time
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)


def run_traffic(
    engine: Any,
    requests: list[dict[str, Any]],
    *,
    seed: int,
    concurrency: int,
    chances: Chances,
    tally: Tally,
    most: bool = False,
) -> None:
    """requests: id, prompt, output (tokens). engine: a vLLM LLMEngine. most: as many at a time as there may be, not a random number.

    Raises AssertionError when nothing gets on any more.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    generator = random.Random(seed)
    waiting = list(reversed(requests))
    running: dict[str, tuple[str, int | None]] = {}  # id -> (internal id, step at which it is aborted)
    target, progress = concurrency if most else 1, time.monotonic()
    scheduler = engine.engine_core.engine_core.scheduler
    while waiting or running or scheduler.has_requests():
        if generator.random() < 0.1 and not most:
            target = generator.randint(1, concurrency)
        while waiting and len(running) < target:
            request = waiting.pop()
            sampling = SamplingParams(
                temperature=0,
                ignore_eos=True,
                detokenize=False,
                logprobs=2,
                max_tokens=request["output"],
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            inputs = {"prompt_token_ids": request["prompt"]}
            internal = engine.add_request(request["id"], inputs, sampling, priority=generator.randrange(3))
            aborts = generator.random() < chances.abort
            running[request["id"]] = (internal, tally.steps + generator.randrange(12) if aborts else None)
        tally.concurrency = max(tally.concurrency, len(running))
        for output in engine.step():
            if output.finished and output.request_id in running:
                del running[output.request_id]
                tally.outcomes[output.request_id] = outcome(output)
                progress = time.monotonic()
        tally.steps += 1
        for name, (internal, end) in list(running.items()):
            if end is not None and tally.steps > end:
                engine.abort_request([internal], internal=True)
                del running[name]
                tally.aborted += 1
                progress = time.monotonic()
        if generator.random() < chances.reset:
            engine.reset_prefix_cache(generator.random() < chances.reset_running and _may_preempt_all(scheduler), True)
            tally.resets += 1
        assert time.monotonic() - progress < NO_PROGRESS_SECONDS, f"no progress; under way: {sorted(running)}"


def _may_preempt_all(scheduler: Any) -> bool:
    """vLLM refuses a reset that preempts (RuntimeError) while blocks stay in use: those of a request that does not run, as its load in the
    background is under way, also after it was aborted, or has ended and the request has not been scheduled since; and those that a step
    planned ahead may still write."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    holders = {name for manager in managers for name, blocks in manager.req_to_blocks.items() if blocks}
    return (
        holders <= {request.request_id for request in scheduler.running}
        and not scheduler.deferred_frees
        and all(scheduler._request_blocks_can_be_freed(request) for request in scheduler.running)
    )


def outcome(output: Any) -> dict[str, Any]:
    """A finished request's tokens, their log-probabilities, how far the two best lay apart, and how many tokens were not computed."""
    completion = output.outputs[0]
    ranked = [sorted((entry.logprob for entry in step.values()), reverse=True) for step in completion.logprobs]
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [
            step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
        ],
        "gaps": [abs(values[0] - values[1]) for values in ranked],
        "cached": output.num_cached_tokens,
        "explanation": output.kv_transfer_params,
        "reason": completion.finish_reason,
    }


def spoil(descriptors: Any) -> NoReturn:
    """End a load as one that breaks off: some bytes are garbage."""
    from lmc.errors import TransferError

    ctypes.memset(int(descriptors.dst[0]), 0x41, int(descriptors.size[0]))
    raise TransferError("injected")


def break_copies(backend: Any, seed: int, chances: Chances, tally: Tally) -> Callable[[], None]:
    """Make copies slow or fail at random, a failed load having written garbage; the returned function ends that."""
    from lmc.cache.transfer.planner import Direction
    from lmc.errors import TransferError

    copy, generator = backend.execute, random.Random(seed)

    def broken(descriptors: Any, *arguments: Any) -> None:
        drawn = generator.random()
        if descriptors.direction is Direction.LOAD:
            if drawn < chances.failed_load:
                tally.failed_loads += 1
                spoil(descriptors)
            if generator.random() < chances.slow_load:
                time.sleep(0.1)
        elif drawn < chances.failed_store:
            tally.failed_stores += 1
            raise TransferError("injected")
        copy(descriptors, *arguments)

    backend.execute = broken

    def mend() -> None:
        backend.execute = copy

    return mend
