"""Prompts, engines and the comparison that the engine tests share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lmc.bench.outputs import TIE_LOGPROB
from tests.engines.tiny_model import VOCABULARY
from tests.engines.vllm_driver import VllmDriver

TOKEN = "the operator's"


def wish(**wishes: object) -> dict[str, Any]:
    """extra_args of a request of the operator's, whose wishes are all granted."""
    return {"kv_transfer_params": {"lmc": {**wishes, "token": TOKEN}}}


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(2, VOCABULARY) for _ in range(length)]


def kv_bytes_per_token(model: Path) -> int:
    """In float32, of a Llama's folder."""
    config = json.loads((model / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head * 4)


def driver(model: Path, **settings: Any) -> VllmDriver:
    """An engine with blocks of 32 tokens and chunks of 64."""
    options = settings.pop("options", {})
    defaults = {"chunk_tokens": 64, "host.capacity": "64MiB", "metrics.enabled": False, "strict": True}
    defaults["admin.token"] = TOKEN
    return VllmDriver(model, settings={**defaults, **settings}, **options)


def assert_same(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Greedy tokens and log-probabilities are equal; after a numerical tie a sequence may go its own way."""
    for one, reference in zip(got, wanted, strict=True):
        for step, (token, expected) in enumerate(zip(one["tokens"], reference["tokens"], strict=True)):
            if token != expected:
                assert reference["gaps"][step] < TIE_LOGPROB, f"step {step}: token {token} instead of {expected}"
                break
            assert abs(one["logprobs"][step] - reference["logprobs"][step]) < TIE_LOGPROB
