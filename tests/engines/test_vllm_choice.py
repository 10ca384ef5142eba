"""`load: auto` on a real vLLM: what its passes are measured to take, and a disk that is slower than computing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lmc.cache.connectors.vllm.passes import Passes
from tests.engines.scenario import assert_same, driver, kv_bytes_per_token, prompt

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
