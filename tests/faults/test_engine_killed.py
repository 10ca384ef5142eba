"""kill -9 of the engine in the middle of stores: whatever the disk then holds is whole, or is not served."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.engines.scenario import assert_same, driver, prompt
from tests.engines.vllm_driver import VllmDriver

pytestmark = [pytest.mark.engine, pytest.mark.fault]


def test_kill_during_stores_then_restart(tiny_llama: Path, plain: VllmDriver, disk: Path) -> None:
    rounds = [[prompt(100 * number + index, 700) for index in range(12)] for number in range(3)]
    engine = driver(tiny_llama, **{"disk.path": str(disk)})
    served = 0
    for number, texts in enumerate(rounds):
        engine.send("generate", prompts=texts, parameters={})
        deadline = time.monotonic() + 60
        while num_files(disk) < served + 5 + 20 * number and time.monotonic() < deadline:
            time.sleep(0.002)
        engine.kill()
        served = num_files(disk)
        assert served > 0, "the kill came before the first store"
        engine = driver(tiny_llama, **{"disk.path": str(disk)})
        got = engine.generate(texts)
        assert_same(got, plain.generate(texts))
        assert sum(one["cached"] for one in got) > 0
        state = engine.call("state")
        assert (state["open"], state["pins"]) == (0, 0)
        assert engine.call("metric", name="lmc_failures_total", labels={"operation": "stage"}) == 0
    assert not list(disk.glob("**/tmp/*"))
    engine.close()


def num_files(disk: Path) -> int:
    return sum(1 for file in disk.glob("v*/*/r0/??/*"))
