"""examples/tuning_loop.py with a real engine whose KV space is smaller than the traffic: what was predicted is what is measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmc.cache.settings import load_settings
from lmc.serve.ports import free_port

SCRIPT = Path(__file__).parents[2] / "examples" / "tuning_loop.py"
ENGINE = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "2560", "--num-gpu-blocks-override", "34"]
POINTS = 3.0  # of the prompt tokens: bench's own warm-up prompts, which no record knows, evict a little


@pytest.mark.engine
@pytest.mark.timeout(3600)  # two engines and some forty requests, on a machine that may be busy
def test_the_loop_closes(tmp_path: Path) -> None:
    options = ["--out", tmp_path, "--port", str(free_port("127.0.0.1")), "--disk", "1GiB", "--output-tokens", "2"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, "--", *ENGINE],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = re.findall(r"^hits (.*?) +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
    figures = {what: (float(predicted), float(measured)) for what, predicted, measured in lines}
    assert len(figures) == 5, done.stdout
    for what, (predicted, measured) in figures.items():
        assert abs(predicted - measured) <= POINTS, f"{what}\n{done.stdout}"
    whole, _ = figures["in all tiers, by lmc sim replay"]
    device, _ = figures["in device, by lmc sim replay"]
    assert whole > device + 10, "lmc has a part in the hits"
    config = load_settings(tmp_path / "lmc.yaml").config
    assert config.disk.path == tmp_path / "disk" and isinstance(config.host.capacity, int)
