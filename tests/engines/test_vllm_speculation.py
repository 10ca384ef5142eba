"""Speculative decoding and a Redis that hangs, on one real engine that loads in the background.

Drafts are never stored, no wait is without a deadline, and no failed load is tried for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import services
from tests.engines.scenario import assert_same, driver, kv_bytes_per_token, prompt, wish
from tests.engines.vllm_driver import VllmDriver

pytestmark = [pytest.mark.engine, pytest.mark.service]

CHUNK, HOST_CHUNKS = 64, 8
EXPLAIN = wish(explain=True)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.RedisServer]:
    with services.redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, redis: services.RedisServer) -> Iterator[VllmDriver]:
    settings = {
        "host.capacity": HOST_CHUNKS * CHUNK * kv_bytes_per_token(tiny_llama),
        "redis.url": redis.url,
        "redis.timeout": 60.0,  # so that only lmc's own deadlines can end a wait
        "load_deadline": 0.5,
        "lookup_deadline": 0.5,
        "store_decode": True,
        "background_load_tokens": 1,
    }
    guesses = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    with driver(tiny_llama, options={"speculative_config": guesses}, **settings) as started:
        yield started


def explained(got: list[dict[str, Any]]) -> tuple[dict[str, int], str | None]:
    """Tokens by tier, and why the hit ended."""
    answer = got[0]["explanation"]["lmc"]
    return answer["hit_tokens"], answer["miss"]


def test_chunks_of_the_answer_hold_no_rejected_guess(plain: VllmDriver, engine: VllmDriver) -> None:
    text = prompt(1, 80)
    two_words: dict[str, Any] = {"max_tokens": 160, "allowed_token_ids": [7, 11]}  # so that guesses come true
    reference = plain.generate([text], **two_words)
    cold = engine.generate([text], **two_words)
    assert_same(cold, reference)
    drafts, accepted = (
        engine.call("engine_metric", name=f"spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted")
    )
    assert 0 < accepted < drafts
    longer = text + reference[0]["tokens"]
    got = engine.generate([longer])
    assert got[0]["cached"] == (len(longer) - 1) // CHUNK * CHUNK
    assert_same(got, plain.generate([longer]))


def test_a_question_that_redis_does_not_answer_is_a_miss(
    plain: VllmDriver, engine: VllmDriver, redis: services.RedisServer
) -> None:
    text = prompt(2, 200)
    engine.call("settle")
    redis.pause()
    try:
        got = engine.generate([text], extra_args=EXPLAIN)
    finally:
        redis.resume()
    assert explained(got) == ({"device": 0}, "remote deadline")
    assert_same(got, plain.generate([text]))


def test_a_load_that_redis_does_not_send_is_a_miss(
    plain: VllmDriver, engine: VllmDriver, redis: services.RedisServer
) -> None:
    text = prompt(3, 300)
    engine.generate([text])
    engine.generate([prompt(4, 600)])  # takes all of the host
    engine.call("settle")
    redis.pause()
    try:
        got = engine.generate([text], extra_args=EXPLAIN)
    finally:
        redis.resume()
    assert explained(got) == ({"device": 0}, "load deadline")
    assert_same(got, plain.generate([text]))
    engine.generate([prompt(5, 600)])
    engine.call("settle")
    got = engine.generate([text], extra_args=EXPLAIN)
    assert explained(got) == ({"device": 0, "redis": 256}, None)
    assert_same(got, plain.generate([text]))


def test_a_chunk_that_cannot_be_copied_is_not_offered_again(plain: VllmDriver, engine: VllmDriver) -> None:
    """Redis still holds it, and vLLM looks a request up again whose load failed."""
    text = prompt(6, 300)
    engine.generate([text])
    engine.call("settle")
    before = engine.call("metric", name="lmc_failures_total", labels={"operation": "load"})
    engine.call("fail_loads", count=1000)
    got = engine.generate([text])
    engine.call("fail_loads", count=0)
    assert_same(got, plain.generate([text]))
    failures = engine.call("metric", name="lmc_failures_total", labels={"operation": "load"}) - before
    assert 0 < failures <= len(text) // CHUNK


def test_nothing_is_left_over(engine: VllmDriver) -> None:
    assert {name: number for name, number in engine.call("leftovers").items() if number} == {}
