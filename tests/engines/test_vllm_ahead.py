"""Async scheduling on the real engine: steps are planned before the tokens of the step before them are known.

Every load is asked for before the pass, and the role is one in which vLLM preempts requests whose tokens are under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.scenario import assert_same, driver, prompt
from tests.engines.vllm_driver import VllmDriver

pytestmark = [pytest.mark.engine, pytest.mark.compat]


@pytest.fixture(scope="module")
def ahead(tiny_llama: Path) -> Iterator[VllmDriver]:
    options = {
        "enable_prefix_caching": True,
        "max_model_len": 1024,
        "num_gpu_blocks_override": 60,
        "async_scheduling": True,
        "kv_role": "kv_producer",
    }
    with driver(tiny_llama, background_load_tokens=1_000_000, options=options) as engine:
        assert engine.call("steps_in_flight") == 2
        yield engine


def test_a_preempted_request_keeps_the_token_that_was_under_way(plain: VllmDriver, ahead: VllmDriver) -> None:
    """vLLM throws it away if a connector says that its KV must be delivered."""
    texts = [prompt(300 + index, 180) for index in range(8)]
    reference = plain.generate(texts, max_tokens=60)
    ahead.call("count_samples")
    got = ahead.generate(texts, max_tokens=60)
    assert_same(got, reference)
    assert ahead.call("engine_metric", name="num_preemptions") > 0
    assert ahead.call("samples") == sum(len(one["tokens"]) for one in got)


def test_a_failed_load_is_recomputed_and_poisons_nothing(plain: VllmDriver, ahead: VllmDriver) -> None:
    """vLLM would run on wrong ids after a load that failed inside a pass: the next one is already under way."""
    text = prompt(310, 400)
    longer = text + prompt(311, 200)
    reference = plain.generate([longer])
    ahead.generate([text])
    ahead.call("reset_device")
    ahead.call("fail_loads", count=1)
    assert_same(ahead.generate([longer]), reference)
    ahead.call("reset_device")
    again = ahead.generate([longer])
    assert again[0]["cached"] == 576  # stored anew
    assert_same(again, reference)
    assert ahead.call("metric", name="lmc_failures_total", labels={"operation": "load"}) > 0


def test_a_request_aborted_while_loading_leaves_nothing(plain: VllmDriver, ahead: VllmDriver) -> None:
    text = prompt(312, 700)
    ahead.generate([text])
    ahead.call("reset_device")
    ahead.call("abort_while_loading", prompt=text)
    assert_same(ahead.generate([text]), plain.generate([text]))


def test_nothing_is_left_over(ahead: VllmDriver) -> None:
    assert {name: number for name, number in ahead.call("leftovers").items() if number} == {}
