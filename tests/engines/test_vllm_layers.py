"""Loads layer by layer on the real vLLM engine, with threads in the place of a device's streams: outputs unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.scenario import assert_same, driver, prompt
from tests.engines.vllm_driver import VllmDriver

pytestmark = pytest.mark.engine

LAYERS, LAYER_SECONDS = 4, 0.02
BLOCKS = 60  # the first of them is never used


@pytest.fixture(scope="module")
def layered(tiny_llama: Path) -> Iterator[VllmDriver]:
    options = {"max_model_len": 1024, "num_gpu_blocks_override": BLOCKS}
    with driver(tiny_llama, background_load_tokens=1_000_000, options=options) as engine:
        engine.call("load_by_layer")
        yield engine


def test_a_hit_is_loaded_while_the_pass_runs_and_the_output_is_the_same(plain: VllmDriver, layered: VllmDriver) -> None:
    text = prompt(70, 700)
    reference = plain.generate([text])
    layered.generate([text])
    warm = layered.generate([text])
    assert warm[0]["cached"] == 640
    assert_same(warm, reference)
    (seconds,) = layered.call("loads_by_layer")
    assert seconds < LAYERS * LAYER_SECONDS, "the pass began before the last layer was there"


def test_requests_of_one_pass_share_blocks_and_load_together(plain: VllmDriver, layered: VllmDriver) -> None:
    common = prompt(71, 256)
    texts = [common + prompt(72 + index, 100 + 17 * index) for index in range(4)]
    reference = plain.generate(texts)
    layered.generate(texts)
    got = layered.generate(texts)
    assert all(one["cached"] >= 256 for one in got)
    assert_same(got, reference)
    assert len(layered.call("loads_by_layer")) > 1
    failures = layered.call("metric", name="lmc_failures_total", labels={"operation": "load"})
    assert failures == 0, "every layer was waited for"


@pytest.mark.parametrize("after", range(LAYERS))
def test_a_failure_in_any_layer_is_recomputed_and_poisons_nothing(
    plain: VllmDriver, layered: VllmDriver, after: int
) -> None:
    text = prompt(80 + after, 400)
    longer = text + prompt(180 + after, 200)
    reference = plain.generate([longer])
    layered.generate([text])
    layered.call("fail_loads", count=1, after=after)
    assert_same(layered.generate([longer]), reference)
    again = layered.generate([longer])
    assert again[0]["cached"] == 576  # stored anew
    assert_same(again, reference)
    assert layered.call("metric", name="lmc_failures_total", labels={"operation": "load"}) > 0


def test_blocks_are_not_overwritten_before_a_store_has_read_them(plain: VllmDriver, layered: VllmDriver) -> None:
    text = prompt(90, 400)
    others = [prompt(91 + number, 600) for number in range(3)]  # 57 blocks: those of the first prompt among them
    past_lmc = {"kv_transfer_params": {"lmc": {"bypass": True}}}
    layered.generate(others, max_tokens=1, extra_args=past_lmc)  # so that the second time is quick
    layered.call("delay_stores", seconds=2.0)
    layered.generate([text], max_tokens=1)
    layered.generate(others, max_tokens=1, extra_args=past_lmc)
    layered.call("delay_stores", seconds=0.0)
    layered.call("settle")
    got = layered.generate([text])
    assert got[0]["cached"] == 384
    assert_same(got, plain.generate([text]))


def test_nothing_is_left_over(layered: VllmDriver) -> None:
    state = layered.call("state")
    assert (state["open"], state["pins"], state["requests"], state["tracked"]) == (0, 0, 0, 0)
