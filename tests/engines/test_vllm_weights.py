"""Weights that change while vLLM runs: what each set of them computes is stored under its own name, on disk too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.scenario import assert_same, driver, prompt
from tests.engines.tiny_model import make_tiny_llama
from tests.engines.vllm_driver import VllmDriver

pytestmark = pytest.mark.engine


def test_new_weights_neither_read_nor_leave_chunks_of_the_old_ones_name(
    tiny_llama: Path, plain: VllmDriver, tmp_path: Path
) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=1)
    text = prompt(11, 700)
    settings = {"host.capacity": "64MiB", "disk.path": str(tmp_path / "disk")}
    with driver(tiny_llama, options={}, **settings) as engine:
        old = engine.generate([text])
        engine.call("settle")
        named = engine.call("namespace")["model"]
        engine.call("reset")
        assert_same(engine.generate([text]), old)
        assert engine.call("namespace")["model"] == named  # the weights are those of before
        engine.call("settle")
        assert engine.generate([text])[0]["cached"] > 0
        engine.call("reset")
        engine.call("reload_weights", folder=str(other))  # also after the reset, if no request came between
        new = engine.generate([text])
        assert new[0]["cached"] == 0
        assert new[0]["tokens"] != old[0]["tokens"]
        assert engine.call("namespace")["model"] != named
        engine.call("settle")
        again = engine.generate([text])
        assert again[0]["cached"] > 0
        assert_same(again, new)
    with driver(tiny_llama, options={}, **settings) as engine:
        assert engine.call("namespace")["model"] == named
        assert_same(engine.generate([text]), plain.generate([text]))
