"""Both engines' counters mean the same to a verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmc.bench.counters import parse
from lmc.bench.engine_counters import Pool, device_hits, looked_up, looked_up_at_start, pool
from lmc.bench.expected import expected_by_request
from lmc.bench.prompts import Request
from lmc.bench.schedule import make_plan
from lmc.bench.stages import hits_by_tier
from lmc.bench.workload import Arm, Workload
from tests.bench.conftest import small_workload

SGLANG = """sglang:page_size{tp_rank="0"} 64.0
sglang:page_size{tp_rank="1"} 64.0
sglang:num_pages{tp_rank="0"} 20.0
"""
COLD = SGLANG + 'sglang:prompt_tokens_total{is_streaming="false"} 7.0\n'
WARM = SGLANG + (
    'sglang:prompt_tokens_total{is_streaming="false"} 7.0\n'
    'sglang:prompt_tokens_total{is_streaming="true"} 900.0\n'
    'sglang:cached_tokens_total{cache_source="device"} 640.0\n'
)
WITH_LMC = 'lmc_device_tokens_total 384.0\nlmc_hit_tokens_total{tier="host"} 256.0\n'
VLLM = """vllm:cache_config_info{block_size="128",num_gpu_blocks="341"} 1.0
vllm:prefix_cache_queries_total 900.0
vllm:prefix_cache_hits_total 640.0
"""


def test_sglang_without_lmc_counts_its_own_hits() -> None:
    cold, warm = parse([COLD]), parse([WARM])
    assert looked_up(warm, cold) == 900.0
    assert device_hits(warm, cold) == 640.0
    assert device_hits(cold, cold) == 0.0, "a counter that has not grown yet is not unknown"
    assert hits_by_tier(warm, cold) == {"device": 640.0}


def test_sglang_with_lmc_does_not_count_a_loaded_token_twice() -> None:
    cold, warm = parse([COLD, WITH_LMC.replace("384", "0").replace("256", "0")]), parse([WARM, WITH_LMC])
    assert hits_by_tier(warm, cold) == {"device": 384.0, "host": 256.0}


def test_vllm_counts_in_its_own_words() -> None:
    none, some = parse([""]), parse([VLLM])
    assert (looked_up(some, none), device_hits(some, none)) == (900.0, 640.0)
    assert (looked_up(none, none), device_hits(none, none)) == (None, None)


def test_what_the_engine_asked_itself_at_start_leaves_it_empty() -> None:
    assert looked_up_at_start(parse([COLD])) == 0
    assert looked_up_at_start(parse([WARM])) == 907.0
    assert looked_up_at_start(parse([VLLM])) == 900.0


def test_the_pool_is_read_from_either() -> None:
    assert pool(parse([SGLANG])) == Pool(64, 20, False)
    assert pool(parse([VLLM])) == Pool(128, 341, True)
    assert pool(parse(["x_total 1.0\n"])) is None


@pytest.mark.parametrize(("prompt_tokens", "judged"), [(320, True), (640, False)])
def test_sglang_s_own_cache_is_judged_where_it_forgets_nothing(prompt_tokens: int, judged: bool) -> None:
    prompts = [np.arange(first, first + prompt_tokens, dtype=np.int32) for first in (0, 5000)]
    sessions = [[Request("p", number, 0, prompts[number % 2], 4)] for number in range(4)]
    plan = make_plan(sessions, Workload.model_validate(small_workload(load={"kind": "closed"})))
    arm: dict[str, Any] = {"reuse": "engine"}
    hits, exact = expected_by_request(Arm.model_validate(arm), plan, parse([COLD]), [], [])
    reused = (prompt_tokens - 1) // 64 * 64
    assert (hits, exact) == (([0, 0, reused, reused], True) if judged else (None, False))


def test_what_vllm_loads_through_a_connector_is_counted_where_lmc_s_own_page_is_not_read() -> None:
    external = VLLM + "vllm:external_prefix_cache_hits_total 256.0\n"
    assert hits_by_tier(parse([external]), parse([""])) == {"device": 640.0, "external": 256.0}
    assert hits_by_tier(parse([external]), parse([external])) == {"device": 0.0}
    with_page = hits_by_tier(parse([external, WITH_LMC]), parse([""]))
    assert with_page == {"device": 640.0, "host": 256.0}, "each token is counted once"
