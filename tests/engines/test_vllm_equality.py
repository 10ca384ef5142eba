"""Random traffic with aborts, preemptions, resets and faults on the real engine: tokens as without lmc, and nothing left over.

benchmarks/equality.py does the same with real workloads and a real model, benchmarks/equality_rounds.py with many seeds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engines.equality import SCENARIOS, Scenario, random_sessions, run_scenario
from tests.engines.vllm_driver import VllmDriver

pytestmark = [pytest.mark.engine, pytest.mark.fault, pytest.mark.service]


REQUESTS = random_sessions(1, 120)
# One of them with an engine that schedules ahead, as one on a device does
RUNS = [replace(one, options={**one.options, "async_scheduling": one.name == "in the background"}) for one in SCENARIOS]


@pytest.fixture(scope="module")
def wanted(plain: VllmDriver) -> dict[str, dict[str, Any]]:
    outcomes: dict[str, dict[str, Any]] = plain.call("traffic", requests=REQUESTS, seed=1, concurrency=12, chances={})[
        "outcomes"
    ]
    assert len(outcomes) == len(REQUESTS)
    return outcomes


@pytest.mark.parametrize("scenario", RUNS, ids=[scenario.name for scenario in RUNS])
def test_tokens_are_those_of_the_engine_without_lmc_and_nothing_is_left_over(
    tiny_llama: Path, wanted: dict[str, dict[str, Any]], tmp_path: Path, scenario: Scenario
) -> None:
    requests = REQUESTS if scenario.engines == 1 else REQUESTS[:80]
    verdict = run_scenario(
        scenario, tiny_llama, requests, wanted, tmp_path, seed=2, host_chunks=16, disk_chunks=32, blocks=48, context=768
    )
    print(verdict)  # noqa: T201  what a failed run went through
    assert verdict.comparison.differences == []
    assert len(verdict.comparison.ties) < 5
    assert verdict.comparison.requests + verdict.tally["aborted"] == len(requests)
    assert {name: number for name, number in verdict.leftovers.items() if number} == {}
    assert verdict.preemptions > 0 and verdict.tally["aborted"] > 0
    assert verdict.loaded.get("host", 0) > 0
    assert any(verdict.loaded.get(tier, 0) > 0 for tier in scenario.tiers)
