"""Compression in the simulator: what a chunk takes, what a load costs, and where it pays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmc.cache.tiers.format import stored_bytes
from lmc.cli import app
from lmc.errors import ConfigError
from lmc.sim.build import TraceBuilder
from lmc.sim.compression import NO_CODEC, Codec, make_codec, where_it_pays, with_codec
from lmc.sim.cost import CostModel, Prefill, TierCost
from lmc.sim.full_replay import Fleet, replay_fleet
from lmc.sim.tune import make_budget, tune
from tests.sim.test_agrees_with_live import CHUNK_BYTES, CHUNK_TOKENS, Tiers, configured

COST = CostModel(Prefill(0.0, 1e-3, 0.0), 1000, {"host": TierCost("host", 1e10), "disk": TierCost("disk", 1e9)})


def test_a_load_takes_the_time_of_fewer_bytes_and_the_codec_s() -> None:
    codec = Codec(0.7, 4e9)
    cost = with_codec(COST, codec)
    assert cost.tier("disk").seconds(1e9) == pytest.approx(0.7 + 0.25)
    assert cost.tier("host") == COST.tier("host")
    assert with_codec(COST, NO_CODEC).tier("disk").bytes_per_s == pytest.approx(1e9)


@pytest.mark.parametrize("bandwidth", [1e8, 1.1e9, 1.3e9, 1e10])
def test_it_pays_below_the_bandwidth_that_is_named(bandwidth: float) -> None:
    codec = Codec(0.7, 4e9)  # 1.2 GB/s
    cost = CostModel(COST.prefill, 1000, {"disk": TierCost("disk", bandwidth)})
    quicker = with_codec(cost, codec).tier("disk").seconds(1e9) < cost.tier("disk").seconds(1e9)
    assert quicker == (bandwidth < codec.pays_below)
    room, first, line = where_it_pays(cost, codec)
    assert "0.700 of its size" in room
    assert "less than 1.2 GB/s per thread" in first
    assert line.endswith("it pays" if quicker else "it only saves room")


def rounds(prompts: int) -> TraceBuilder:
    """Every prompt of one chunk comes again and again in the same order, which LRU serves either wholly or not at all."""
    builder = TraceBuilder("made", "test", CHUNK_TOKENS)
    for number in range(10 * prompts):
        builder.add(number + 1, [number % prompts], float(number), CHUNK_TOKENS + 1, 0)
    return builder


def test_a_compressed_disk_holds_more_in_the_replay() -> None:
    trace = rounds(13).finish()
    tiers = Tiers(host=1, disk=10)
    raw = replay_fleet(trace, configured(tiers, {}), CHUNK_BYTES, Fleet())
    assert raw.hits("all")["disk"] == 0
    tiers = Tiers(host=1, disk=10, saved=stored_bytes(CHUNK_BYTES) * 3 // 10)
    compressed = replay_fleet(trace, configured(tiers, {}), CHUNK_BYTES, Fleet(codec=Codec(0.5)))
    assert compressed.hits("all")["disk"] == 9 * 13 * CHUNK_TOKENS


def test_tuning_counts_compressed_chunks() -> None:
    trace = rounds(13).finish()
    budget = make_budget(str(CHUNK_BYTES), str(10 * stored_bytes(CHUNK_BYTES)), None, None)
    size = CHUNK_BYTES // CHUNK_TOKENS
    raw = tune(trace, size, budget, ["lru"])
    compressed = tune(trace, size, budget, ["lru"], codec=Codec(0.5, 4e9))
    assert (raw.chosen.hit_rate, raw.compress) == (0.0, "none")
    assert compressed.chosen.hit_rate > 0.7 and compressed.compress == "lossless"
    assert any("0.500 of its size on disk" in note for note in compressed.notes)
    assert any("less than 2.0 GB/s per thread" in note for note in compressed.notes)


@pytest.mark.parametrize(
    ("ratio", "speed", "message"),
    [(0.0, None, "compression ratio of 0.0"), (1.5, None, "ratio of 1.5"), (0.7, "0GB/s", "0 bytes per second")],
)
def test_an_impossible_codec_is_refused(ratio: float, speed: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_codec(ratio, speed)


def trace_file(folder: Path) -> Path:
    path = folder / "trace.jsonl"
    lines = [
        {
            "timestamp": 1000 * number,
            "input_length": 3 * 512 + 1,
            "output_length": 1,
            "hash_ids": [4 * (number % 13) + block for block in range(4)],
        }
        for number in range(130)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_replay_and_tune_take_the_ratio_and_the_speed(tmp_path: Path) -> None:
    trace = trace_file(tmp_path)
    chunk = 512 * 1000
    text = "chunk_tokens: 512\nhost: {{capacity: {}}}\ndisk: {{path: /nowhere, capacity: {}, compress: {}}}\n"
    hits = {}
    for compress in ("none", "lossless"):
        config = tmp_path / f"{compress}.yaml"
        config.write_text(text.format(3 * chunk, 30 * (chunk + 4096), compress))
        more = [] if compress == "none" else ["--compress-ratio", "0.6", "--codec-speed", "4GB/s"]
        arguments = ["sim", "replay", str(trace), "--config", str(config), "--token-bytes", "1000", "--json", *more]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        shown = json.loads(result.stdout)
        hits[compress] = shown["hit_tokens"]["disk"]
    assert hits["none"] == 0 < hits["lossless"]
    assert any("takes 0.600 of its size" in note for note in shown["notes"])
    out = tmp_path / "tuned.yaml"
    arguments = [
        "sim",
        "tune",
        str(trace),
        "--memory",
        "1600kB",
        "--disk",
        "20MB",
        "--token-bytes",
        "1000",
        "-o",
        str(out),
    ]
    result = CliRunner().invoke(app, [*arguments, "--compress-ratio", "0.6", "--policy", "lru"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "compress: lossless" in out.read_text()
