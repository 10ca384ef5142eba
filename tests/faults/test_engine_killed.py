"""kill -9 of the engine in the middle of stores: whatever the disk then holds is whole, or is not served."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.engines.scenario import assert_same, driver, prompt
from tests.engines.vllm_driver import VllmDriver

pytestmark = [pytest.mark.engine, pytest.mark.fault]


def test_kill_during_stores_then_restart(tiny_llama: Path, plain: VllmDriver, disk: Path) -> None:
    engine = driver(tiny_llama, **{"disk.path": str(disk)})
    for number in range(3):
        texts = [prompt(100 * number + index, 700) for index in range(12)]
        before = num_files(disk)
        engine.send("generate", prompts=texts, parameters={})
        deadline = time.monotonic() + 60
        while num_files(disk) < before + 25 and time.monotonic() < deadline:
            time.sleep(0.002)
        engine.kill()
        assert before + 25 <= num_files(disk) < before + 120, "the kill did not come in the middle of the stores"
        engine = driver(tiny_llama, **{"disk.path": str(disk)})
        got = engine.generate(texts)
        assert_same(got, plain.generate(texts))
        assert 0 < sum(one["cached"] for one in got) < 12 * 640
        state = engine.call("state")
        assert (state["open"], state["pins"]) == (0, 0)
        assert engine.call("metric", name="lmc_failures_total", labels={"operation": "stage"}) == 0
    engine.close()
    assert not list(disk.glob("**/tmp/*"))


def num_files(disk: Path) -> int:
    return sum(1 for file in disk.glob("v*/*/r0/??/*"))
