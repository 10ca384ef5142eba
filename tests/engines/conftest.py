from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.tiny_model import VOCABULARY, make_tiny_llama
from tests.engines.vllm_driver import VllmDriver


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(2, VOCABULARY) for _ in range(length)]


def driver(model: Path, **settings: Any) -> VllmDriver:
    """An engine with blocks of 32 tokens and chunks of 64."""
    options = settings.pop("options", {})
    defaults = {"chunk_tokens": 64, "host.capacity": "64MiB", "metrics.enabled": False, "strict": True}
    return VllmDriver(model, settings={**defaults, **settings}, **options)


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Iterator[VllmDriver]:
    """The reference: vLLM without a connector and without prefix caching."""
    with VllmDriver(tiny_llama, settings=None) as engine:
        yield engine
