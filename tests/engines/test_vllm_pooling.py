"""Pooling models on the real engine: what cannot go on from a loaded prefix runs without the cache and says so; the rest is cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.scenario import driver, prompt
from tests.engines.tiny_model import add_tokenizer, make_tiny_bert, make_tiny_llama
from tests.engines.vllm_driver import VllmDriver

pytestmark = pytest.mark.engine

TEXT = prompt(60, 700)


def pooling(model: Path, pooler: str | None, **settings: Any) -> VllmDriver:
    options: dict[str, Any] = {
        "runner": "pooling",
        "skip_tokenizer_init": False,
        "max_model_len": 512 if pooler is None else 1024,
    }
    if pooler is not None:
        options |= {"convert": "embed", "pooler_config": {"seq_pooling_type": pooler}}
    return driver(add_tokenizer(model), options=options, **settings)


def refusals(engine: VllmDriver) -> list[str]:
    return [line for line in engine.log if "lmc:" in line and "WITHOUT" in line]


def close(one: list[float], other: list[float]) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-5


def test_an_encoder_without_kv_runs_without_the_cache(tmp_path: Path) -> None:
    with pooling(make_tiny_bert(tmp_path / "model"), None, strict=False) as engine:
        texts = [TEXT[:200], TEXT[:200], TEXT[200:300]]
        first = engine.call("embed", prompts=texts)
        again = engine.call("embed", prompts=texts)
        assert [one["cached"] for one in (*first, *again)] == [0] * 6
        assert close(first[0]["vector"], again[1]["vector"]) and not close(first[0]["vector"], first[2]["vector"])
        assert len(refusals(engine)) == 1 and "keeps no KV" in refusals(engine)[0]


def test_pooling_over_the_whole_prompt_runs_without_the_cache(tmp_path: Path) -> None:
    """vLLM has no states of the tokens of a loaded prefix: it would end at the second of these."""
    with pooling(make_tiny_llama(tmp_path / "model"), "MEAN", strict=False) as engine:
        first, again = (engine.call("embed", prompts=[TEXT])[0] for _ in range(2))
        assert [first["cached"], again["cached"]] == [0, 0]
        assert close(first["vector"], again["vector"])
        assert len(refusals(engine)) == 1 and "--pooler-config" in refusals(engine)[0]


def test_pooling_of_the_last_token_keeps_its_hits(tmp_path: Path) -> None:
    with pooling(make_tiny_llama(tmp_path / "model"), "LAST") as engine:
        first = engine.call("embed", prompts=[TEXT])[0]
        engine.call("settle")
        again = engine.call("embed", prompts=[TEXT])[0]
        other = engine.call("embed", prompts=[[*TEXT[:-1], 7]])[0]
        assert [first["cached"], again["cached"], other["cached"]] == [0, 640, 640]
        assert close(first["vector"], again["vector"]) and not close(first["vector"], other["vector"])
        assert refusals(engine) == []
