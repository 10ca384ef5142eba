"""`load: auto` on a real vLLM: what its passes are measured to take, and a disk that is slower than computing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from lmc.cache.connectors.vllm.passes import Passes, parts_of
from tests.engines.scenario import assert_same, driver, kv_bytes_per_token, prompt
from tests.engines.test_vllm_hooks import BLOCK_TOKENS, scheduler_of

pytestmark = pytest.mark.engine

LENGTH = 520  # eight chunks and a few tokens


def clock(*times: float) -> Callable[[], float]:
    left = iter(times)
    return lambda: next(left)


def test_a_pass_takes_from_its_plan_or_from_the_end_of_the_one_before_to_its_end() -> None:
    passes = Passes(clock(0.0, 1.0, 5.0, 7.0))
    passes.plan([(0, 100)])
    passes.plan([(100, 50)])  # planned ahead
    assert passes.end() == ([(0, 100)], 5.0)
    assert passes.end() == ([(100, 50)], 2.0)
    assert passes.end() == ((), 0.0)


def test_steps_whose_ends_nobody_tells_are_forgotten() -> None:
    passes = Passes(lambda: 0.0)
    for number in range(1_000):
        passes.plan([(number, 1)])
    assert len(passes._planned) <= 16


def test_the_parts_of_a_pass_are_those_that_vllm_computes(tiny_llama: Path) -> None:
    """vLLM's own scheduler, with few blocks: chunked prompts, preemption, requests that decode beside prompts."""
    scheduler = scheduler_of(tiny_llama, num_blocks=40)
    requests: dict[str, Request] = {}
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(BLOCK_TOKENS, hash_function)
    for number in range(12):
        tokens, sampling = prompt(number, 40 + 30 * number), SamplingParams(max_tokens=20)
        requests[f"r{number}"] = request = Request(f"r{number}", tokens, sampling, None, block_hasher=hasher)
        scheduler.add_request(request)
    seen = {"prompts": 0, "mixed": 0, "decoding": 0}
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        scheduled = output.num_scheduled_tokens
        at = {rid: requests[rid].num_computed_tokens - count for rid, count in scheduled.items()}
        decoding = [rid for rid in scheduled if at[rid] >= requests[rid].num_prompt_tokens]
        parts = parts_of(output, lambda rid: requests[rid].num_prompt_tokens)
        if len(decoding) == len(scheduled):
            assert parts == ()
            seen["decoding"] += 1
        else:
            assert sorted(parts) == sorted((at[rid], count) for rid, count in scheduled.items())
            seen["mixed" if decoding else "prompts"] += 1
        sampled = [[7] if requests[rid].num_computed_tokens >= requests[rid].num_tokens else [] for rid in scheduled]
        indices = {rid: index for index, rid in enumerate(scheduled)}
        scheduler.update_from_output(
            output, ModelRunnerOutput(req_ids=list(scheduled), req_id_to_index=indices, sampled_token_ids=sampled)
        )
    assert all(seen.values()), "the test says nothing"


def test_what_lies_on_a_slow_disk_is_computed_and_the_answers_are_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = [prompt(seed, LENGTH) for seed in (1, 2)]
    capacity = LENGTH // 64 * 64 * kv_bytes_per_token(tiny_llama)  # of one of them
    settings = {"load": "auto", "disk.path": str(tmp_path), "host.capacity": capacity, "load_deadline": 60.0}
    with driver(tiny_llama, **settings) as engine:
        engine.call("throttle_disk", bytes_per_s=capacity / 3)
        reference = []
        for one in prompts:
            reference += engine.generate([one])
            engine.call("settle")
        measured = engine.call("expected_seconds", new=LENGTH)
        assert 0 < measured < 60
        for number in range(6):
            got = engine.generate([prompts[number % 2]])
            assert_same(got, [reference[number % 2]])
            engine.call("settle")
        reasons = engine.call("by_label", name="lmc_misses_total", label="reason")
        assert (
            reasons["slower than computing"] >= 3
        )  # the first one showed how slow the disk is, another one may be a try
