from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.errors import ConfigError
from lmc.sim import cost, cost_file
from lmc.sim.cost import CostModel, Prefill, TierCost

FAST = TierCost("host", 1e6, 0.001, 0.5)
SLOW = TierCost("disk", 1e4, 0.01, 0.25)
MODEL = CostModel(Prefill(0.01, 0.001, 1e-6), 100, {"host": FAST, "disk": SLOW}, 3.6)


def array(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def test_prefill_seconds_count_attention_over_everything_before() -> None:
    prefill = Prefill(1.0, 0.5, 0.25)
    assert prefill.seconds(array(0, 10), array(4, 4)).tolist() == [1 + 2 + 0.25 * 8, 1 + 2 + 0.25 * 4 * 12]
    assert prefill.seconds(array(7), array(0)).tolist() == [0.0]


@settings(max_examples=200)
@given(st.integers(1, 5000), st.data())
def test_saved_seconds_are_the_difference_of_prefills(length: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, length - 1))
    whole = MODEL.prefill.seconds(array(0), array(length))[0]
    rest = MODEL.prefill.seconds(array(hits), array(length - hits))[0]
    assert MODEL.prefill.saved(hits, hits**2) == pytest.approx(whole - rest, abs=1e-9)


@settings(max_examples=300)
@given(st.integers(1, 3000), st.integers(0, 3000), st.integers(0, 3000))
def test_a_request_loads_as_far_as_it_pays(length: int, host: int, disk: int) -> None:
    host = min(host, length)
    disk = min(disk, length - host)

    def seconds(tiers: list[tuple[TierCost, int]]) -> float:
        hits = min(sum(tokens for _, tokens in tiers), length - 1)
        waited = sum(tier.latency_s + tokens * 100 / tier.bytes_per_s for tier, tokens in tiers if tokens)
        new = length - hits
        return waited + 0.01 + 0.001 * new + 1e-6 * new * (hits + new / 2)

    ttft, computed = MODEL.serve(array(length), {"host": array(host), "disk": array(disk)})
    choices = [seconds([]), seconds([(FAST, host)]), seconds([(FAST, host), (SLOW, disk)])]
    assert ttft[0] == pytest.approx(min(choices))
    assert computed[0] <= ttft[0] + 1e-12


def test_break_even_is_the_first_length_that_loads_faster() -> None:
    def gain(tier: TierCost, length: int) -> float:
        return 0.001 * length + 1e-6 * length**2 / 2 - tier.latency_s - length * 100 / tier.bytes_per_s

    for tier in (FAST, SLOW):
        found = MODEL.break_even_tokens(tier.name)
        assert found is not None
        assert gain(tier, found) > 0 and (found == 1 or gain(tier, found - 1) <= 0)
    never = CostModel(Prefill(0, 1e-9, 0), 100, {"disk": SLOW})
    assert never.break_even_tokens("disk") is None


def test_rent_is_per_gib_and_hour() -> None:
    assert MODEL.rent({"host": 2 * 1024**3, "disk": 4 * 1024**3}, 3.0) == pytest.approx(3 * (2 * 0.5 + 4 * 0.25))
    with pytest.raises(ConfigError, match="no tier 'remote'"):
        MODEL.rent({"remote": 1}, 1.0)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 0.1), st.floats(1e-6, 1e-3), st.sampled_from([0.0, 1e-9, 1e-8]))
def test_a_fit_finds_the_coefficients_it_was_made_with(fixed: float, token: float, pair: float) -> None:
    made = Prefill(fixed, token, pair)
    position = array(0, 0, 0, 100, 1000, 5000, 20000, 0)
    new = array(10, 500, 9000, 300, 50, 7000, 4000, 60000)
    found = cost.fit_prefill(position.tolist(), new.tolist(), made.seconds(position, new).tolist())
    assert found.seconds(position, new) == pytest.approx(made.seconds(position, new), rel=1e-6)
    assert min(found.fixed_s, found.token_s, found.pair_s) >= 0


def test_a_fit_never_goes_negative() -> None:
    found = cost.fit_prefill([0, 0, 0], [10, 100, 1000], [0.05, 0.06, 0.055])
    assert min(found.fixed_s, found.token_s, found.pair_s) >= 0
    with pytest.raises(ConfigError, match="too few"):
        cost.fit_prefill([0], [1], [1.0])


TEXT = """
prefill: {fixed: 10ms, token: 30us}
token_bytes: 128KiB
gpu_dollars_per_hour: 2.5
tiers:
  host: {bandwidth: 20GB/s, latency: 100us}
  disk: {bandwidth: 3 GB/s, dollars_per_gib_hour: 0.0001}
"""


def test_a_cost_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cost.yaml"
    path.write_text(TEXT)
    model = cost_file.read_cost_model(path)
    assert (model.prefill.fixed_s, model.prefill.token_s, model.prefill.pair_s) == pytest.approx((0.01, 30e-6, 0))
    assert model.token_bytes == 131072
    assert model.tiers["disk"] == TierCost("disk", 3e9, 0, 0.0001)
    assert (model.tiers["host"].bytes_per_s, model.tiers["host"].latency_s) == (20e9, pytest.approx(100e-6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("token: 30us", "tokens: 30us"), "unknown key 'tokens' in prefill"),
        (("gpu_dollars_per_hour: 2.5", "gpu_dollars_per_hour: lots"), "gpu_dollars_per_hour"),
        (("bandwidth: 20GB/s", "bandwidth: fast"), "fast"),
        (("bandwidth: 20GB/s, ", ""), "size"),
        (("prefill:", "prefills:"), "unknown key 'prefills'"),
        (("{fixed: 10ms, token: 30us}", "{bench: x, token: 30us}"), "remove fixed"),
        (("{fixed: 10ms, token: 30us}", "{bench: x}"), "requests.parquet is not there"),
        (("{fixed: 10ms, token: 30us}", "[1"), "not YAML"),
    ],
)
def test_a_bad_cost_file_is_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "cost.yaml"
    path.write_text(TEXT.replace(*change))
    with pytest.raises(ConfigError, match=message) as caught:
        cost_file.read_cost_model(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cost model file"):
        cost_file.read_cost_model(tmp_path / "absent.yaml")


def test_prefill_is_fitted_from_a_bench_report(tmp_path: Path) -> None:
    made = Prefill(0.02, 0.001, 0.0)
    rows = []
    for arm, cached in (("none", math.nan), ("engine", 64.0), ("lmc", 64.0)):
        for tokens in (100, 200, 400, 900):
            position = int(cached) if arm != "none" else 0
            seconds = made.seconds(array(position), array(tokens - position))[0] * (1 if arm != "lmc" else 9)
            rows.append((arm, "ok", seconds * 1e3, tokens, cached))
    rows.append(("none", "failed", 1e9, 50, math.nan))
    names = ["arm", "status", "service_ttft_ms", "prompt_tokens", "cached_tokens"]
    (tmp_path / "run").mkdir()
    pandas.DataFrame(rows, columns=names).to_parquet(tmp_path / "run" / "requests.parquet")
    (tmp_path / "cost.yaml").write_text("prefill: {bench: run}\ntoken_bytes: 1\n")
    found = cost_file.read_cost_model(tmp_path / "cost.yaml").prefill
    assert (found.fixed_s, found.token_s) == (pytest.approx(0.02), pytest.approx(0.001))


def test_bandwidth_comes_from_a_probe(tmp_path: Path) -> None:
    rows = [
        {"direction": "load", "gb_per_s": 3.0},
        {"direction": "load", "gb_per_s": 7.5},
        {"direction": "store", "gb_per_s": 99.0},
    ]
    (tmp_path / "probe.json").write_text(json.dumps({"rows": rows}))
    path = tmp_path / "cost.yaml"
    path.write_text("prefill: {token: 1us}\ntoken_bytes: 1\ntiers: {host: {probe: probe.json}}\n")
    assert cost_file.read_cost_model(path).tier("host").bytes_per_s == 7.5e9
    (tmp_path / "probe.json").write_text("{}")
    with pytest.raises(ConfigError, match="run that again"):
        cost_file.read_cost_model(path)
    (tmp_path / "probe.json").unlink()
    with pytest.raises(ConfigError, match="No such file"):
        cost_file.read_cost_model(path)
