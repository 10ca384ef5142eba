"""What vLLM's command line is checked for before anything starts."""

from __future__ import annotations

import importlib.util

import pytest

from lmc.cache.config import CacheConfig
from lmc.errors import ConfigError
from lmc.serve import engines


@pytest.mark.parametrize(
    "extra",
    [
        ["--decode-context-parallel-size", "2"],
        ["-dcp", "2"],
        ["--prefill-context-parallel-size=2"],
        ["-pcp", "2"],
        ["--pipeline-parallel-size", "4"],
        ["-pp=4"],
    ],
    ids=str,
)
def test_what_shares_out_layers_or_tokens_is_refused(monkeypatch: pytest.MonkeyPatch, extra: list[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"parallel-size \d is not supported by the cache; use --no-cache"):
        engines.check_engine("vllm", CacheConfig(), extra)
    engines.check_engine("vllm", None, extra)
    engines.check_engine("vllm", CacheConfig(), ["-dcp", "1", "--tensor-parallel-size", "2"])
