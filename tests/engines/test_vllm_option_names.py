"""Options that change KV, on the real engine: what one setting has stored is a miss for another, and each finds its own again.

test_vllm_options.py has all options, one by one, on configurations alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.scenario import assert_same, driver, prompt
from tests.engines.tiny_model import make_tiny_llama, make_tiny_phi

pytestmark = [pytest.mark.engine, pytest.mark.compat]

PAST_LMC = {"kv_transfer_params": {"lmc": {"bypass": True}}}


def serve(model: Path, disk: Path, text: list[int], options: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """Tokens that a new engine finds on disk, and what it computes past the cache; what it answers is the same."""
    settings = {"disk.path": str(disk), "disk.capacity": "64MiB"}
    with driver(model, options=options, **settings) as engine:
        reference = engine.generate([text], extra_args=PAST_LMC)
        got = engine.generate([text])
        assert_same(got, reference)
        engine.call("settle")
        again = engine.generate([text])
        assert again[0]["cached"] == (len(text) - 1) // 64 * 64
        assert_same(again, reference)
        return got[0]["cached"], reference


def test_the_longest_context_is_in_the_name_where_it_changes_the_encoding_of_positions(tmp_path: Path) -> None:
    model, text = make_tiny_phi(tmp_path / "model", original_length=256), prompt(60, 200)
    found, short = serve(model, tmp_path / "disk", text, {"max_model_len": 256})
    assert found == 0
    found, long = serve(model, tmp_path / "disk", text, {"max_model_len": 2048})
    assert found == 0
    assert short[0]["logprobs"] != long[0]["logprobs"]
    found, again = serve(model, tmp_path / "disk", text, {"max_model_len": 256})
    assert found == 192
    assert_same(again, short)


def test_overrides_and_ways_to_load_are_in_the_name(tmp_path: Path) -> None:
    model, text = make_tiny_llama(tmp_path / "model"), prompt(61, 200)
    faster = {"rope_type": "default", "rope_theta": 500_000.0}
    found, plain = serve(model, tmp_path / "disk", text, {})
    assert found == 0
    for options in (
        {"hf_overrides": {"rope_parameters": faster}},
        {"hf_overrides": {"rms_norm_eps": 0.5}},
        {"load_format": "dummy"},
    ):
        found, other = serve(model, tmp_path / "disk", text, options)
        assert found == 0, options
        assert other[0]["logprobs"] != plain[0]["logprobs"], options
    found, again = serve(model, tmp_path / "disk", text, {"max_model_len": 2048})  # which changes nothing here
    assert found == 192
    assert_same(again, plain)
