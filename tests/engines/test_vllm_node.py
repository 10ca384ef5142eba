"""Two real engines on one node: one loads what the other stored, and both go on when the node is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cache.node.attached import Process
from tests.engines.scenario import assert_same, driver, prompt
from tests.engines.vllm_driver import VllmDriver

pytestmark = [pytest.mark.engine, pytest.mark.fault]


def attached(model: Path, node: Process) -> VllmDriver:
    return driver(model, **{"node": str(node.path), "node_deadline": 20.0, "metrics.enabled": False})


def cached(answers: list[dict[str, Any]]) -> int:
    return sum(answer["cached"] for answer in answers)


def test_engines_share_a_node_and_survive_it(tiny_llama: Path, plain: VllmDriver, tmp_path: Path) -> None:
    lines = ("chunk_tokens: 64", "host:", "  capacity: 64MiB")
    node = Process(tmp_path / "node.sock", *lines)
    assert node.ready.startswith("ready socket=")
    texts = [prompt(index, 400) for index in range(4)]
    wanted = plain.generate(texts)
    with attached(tiny_llama, node) as one, attached(tiny_llama, node) as other:
        first = one.generate(texts)
        assert cached(first) == 0
        second = other.generate(texts)
        assert cached(second) == 4 * 384, "what one engine stored is a hit in the other"
        node.kill()
        without = [one.generate(texts), other.generate(texts)]
        node = Process(tmp_path / "node.sock", *lines)
        more = [prompt(100 + index, 400) for index in range(2)]
        for _ in range(100):  # until both have attached again
            again = one.generate(more)
            shared = other.generate(more)
            if cached(shared) == 2 * 384:
                break
        assert cached(shared) == 2 * 384
        for answers in (first, second, *without):
            assert_same(answers, wanted)
        reference = plain.generate(more)
        assert_same(again, reference)
        assert_same(shared, reference)
    code, errors = node.stop()
    assert code == 0, errors
