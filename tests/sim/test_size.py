"""`lmc sim size`: the smallest capacity for a hit rate, against a naive simulator and against resamples drawn one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lmc.cli import app
from lmc.errors import ConfigError
from lmc.sim.cost import CostModel, Prefill, TierCost
from lmc.sim.size import Sizer
from lmc.sim.size_show import parse_share, size_targets
from lmc.sim.trace import Trace
from tests.sim.chained_traces import naive_lru, traces
from tests.sim.test_tune import chats


def naive_rate(trace: Trace, capacity: int) -> float:
    first = trace.num_requests // 2
    hits = naive_lru(trace, capacity)[first:]
    inputs = trace.input_tokens[first:].tolist()
    size = trace.block_tokens
    tokens = sum(min(found, max(length - 1, 0) // size) * size for found, length in zip(hits, inputs, strict=True))
    return tokens / max(sum(inputs), 1)


@settings(max_examples=60, deadline=None)
@given(traces(), st.floats(0.05, 1.0))
def test_the_capacity_is_the_smallest_that_reaches_the_target(trace: Trace, share: float) -> None:
    sizer = Sizer(trace)
    assert sizer.ceiling == pytest.approx(naive_rate(trace, trace.num_unique))
    if sizer.ceiling == 0:
        with pytest.raises(ConfigError, match="no capacity hits"):
            sizer.size(share)
        return
    found = sizer.size(share * sizer.ceiling)
    assert naive_rate(trace, found.blocks) >= found.target - 1e-12
    assert found.blocks == 1 or naive_rate(trace, found.blocks - 1) < found.target
    assert found.low_blocks <= found.blocks <= found.high_blocks
    for place in found.places:
        assert max(place.blocks.values()) == found.blocks


def test_the_interval_widens_with_fewer_sessions() -> None:
    many, few = chats(num_requests=800, num_chats=80), chats(num_requests=200, num_chats=8)
    wide, narrow = (Sizer(trace).size(0.5 * Sizer(trace).ceiling) for trace in (few, many))
    spread = [found.high_blocks / found.low_blocks for found in (wide, narrow)]
    assert spread[0] > spread[1] > 1


def test_tiers_have_times_and_prices() -> None:
    trace = chats()
    tiers = {"host": TierCost("host", 1e9, 0.0, 1.0), "disk": TierCost("disk", 1e8, 0.001, 0.01)}
    cost = CostModel(Prefill(0, 1e-3, 0), 100, tiers, 1.0)
    shown = size_targets(trace, ["40%"], cost, 0, None)
    host, disk = shown.json["rows"]
    assert host["host_bytes"] == disk["disk_bytes"] > disk["host_bytes"]
    assert host["ttft_p50_s"] <= disk["ttft_p50_s"]
    assert host["dollars_per_million_tokens"] > 0
    given = size_targets(trace, ["40%"], cost, 0, "16kB").json["rows"][1]
    assert given["host_bytes"] <= 16_000
    with pytest.raises(ConfigError, match="holds no trace block"):
        size_targets(trace, ["40%"], cost, 0, "1B")


def test_shares_are_parsed_and_impossible_targets_say_what_is_possible() -> None:
    assert (parse_share("60%"), parse_share("0.6")) == (pytest.approx(0.6), 0.6)
    for text in ("0", "0%", "120%", "much", "1.2"):
        with pytest.raises(ConfigError, match="no share"):
            parse_share(text)
    trace = chats()
    ceiling = Sizer(trace).ceiling
    with pytest.raises(ConfigError, match=f"{100 * ceiling:.4g} %"):
        size_targets(trace, ["99.9%"], None, 0, None)


def test_the_command_prints_sizes_and_json(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1000 * n, "input_length": 1500, "output_length": 1, "hash_ids": [n % 7, 100 + n % 7, 1000 + n]}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = CliRunner().invoke(app, ["sim", "size", str(path), "--target", "30%,60%"])
    assert result.exit_code == 0 and "host (GiB)" in result.output and "128.0 KiB are assumed" in result.output
    options = ["--target", "60%", "--token-bytes", "1MiB", "--json"]
    rows = json.loads(CliRunner().invoke(app, ["sim", "size", str(path), *options]).output)["rows"]
    assert [sorted(name for name in row if name.endswith("_bytes")) for row in rows] == [
        ["host_bytes"],
        ["disk_bytes", "host_bytes"],
        ["host_bytes", "remote_bytes"],
    ]
    assert rows[0]["host_bytes"] == rows[0]["capacity_blocks"] * 512 * 2**20


def test_sessions_of_the_trace_are_used_where_it_names_them() -> None:
    trace = chats()
    assert Sizer(trace).sessions_named
    assert not Sizer(replace(trace, sessions=np.full(trace.num_requests, -1, dtype=np.int32))).sessions_named
