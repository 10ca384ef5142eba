"""A workload at several rates, and the search for the highest rate that holds the SLOs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lmc.bench.rates import CLOSE_ENOUGH, MOST_RUNS, at_rate, find, next_rate, parse_rates, parse_slo, write_rates
from lmc.bench.records import RequestRecord, Results
from lmc.bench.workload import OpenLoop, Slo, Workload
from lmc.cli import app
from lmc.errors import WorkloadError
from tests.bench.conftest import RunSmall, small_workload
from tests.bench.strict_server import Strict, serving


@given(st.floats(0.05, 200.0), st.floats(0.5, 8.0))
def test_the_search_ends_close_below_the_limit(limit: float, first: float) -> None:
    known: dict[float, bool] = {}
    while (rate := next_rate(known, first)) is not None:
        assert rate not in known
        known[rate] = rate <= limit
    good = max((rate for rate, held in known.items() if held), default=0.0)
    bad = min((rate for rate, held in known.items() if not held), default=float("inf"))
    assert good <= limit < bad
    assert len(known) <= MOST_RUNS
    if len(known) < MOST_RUNS:
        assert bad <= good * CLOSE_ENOUGH


def test_every_load_can_be_given_a_rate() -> None:
    closed = Workload.model_validate(small_workload(interleave=3))
    assert at_rate(closed, 2.5, 1).load == OpenLoop(kind="poisson", rate=2.5)
    assert (at_rate(closed, 2.5, 1).interleave, at_rate(closed, 2.5, 1).seed) == (None, 0)
    gamma = Workload.model_validate(small_workload(load={"kind": "gamma", "rate": 1.0, "burstiness": 0.5}))
    assert at_rate(gamma, 4.0, 0).load == OpenLoop(kind="gamma", rate=4.0, burstiness=0.5)
    users = Workload.model_validate(small_workload(load={"kind": "users", "users": 3, "rate": 1.0}))
    assert at_rate(users, 4.0, 0).load.rate == 4.0  # type: ignore[union-attr]
    running = Workload.model_validate(small_workload(bars=[], arms={"a": {"url": "http://x"}}))
    assert at_rate(running, 1.0, 2).seed == 2, "a server that runs still holds the prompts of the rate before"
    with pytest.raises(WorkloadError, match="the data's own times"):
        at_rate(Workload.model_validate(small_workload(load={"kind": "trace"})), 1.0, 0)


@pytest.mark.parametrize("text", ["", "x", "1,,2", "0", "-1", "inf", "nan"])
def test_bad_rates_are_said(text: str) -> None:
    with pytest.raises(WorkloadError, match=r"--rates: .* is not a list of rates"):
        parse_rates(text)


def test_bounds_are_parsed() -> None:
    assert parse_rates("4, 1,2") == [1.0, 2.0, 4.0]
    assert parse_slo("ttft_ms=500, tpot_ms=50") == Slo(ttft_ms=500, tpot_ms=50)
    for text in ("ttft_ms", "ttft=3", "ttft_ms=-1", "ttft_ms=x", "ttft_ms=nan"):
        with pytest.raises(WorkloadError, match="--slo: "):
            parse_slo(text)


def test_each_arm_has_its_own_highest_rate(run_small: RunSmall, tmp_path: Path) -> None:
    """The runs are made up from one: an arm holds its SLOs up to its limit."""
    arms = {"none": {"reuse": "none"}, "engine": {"reuse": "none"}}
    made, records = run_small(bars=[], arms=arms, load={"kind": "poisson", "rate": 50.0})
    limits = {"none": 3.0, "engine": 11.0}
    asked: list[tuple[str, float]] = []

    def run(load: Workload, names: Sequence[str]) -> tuple[Results, list[RequestRecord]]:
        [name] = names
        rate = load.load.rate  # type: ignore[union-attr]
        asked.append((name, rate))
        [arm] = [arm for arm in made.arms if arm.name == name]
        share = 1.0 if rate <= limits[name] else 0.5
        return replace(made, arms=[replace(arm, goodput_share=share)]), records

    workload = Workload.model_validate(small_workload(bars=[], arms=arms, slo={"ttft_ms": 100}))
    found = find(workload, ["none", "engine"], 1.0, run, tmp_path)
    for name, limit in limits.items():
        rate = found.highest[name]
        assert rate is not None and limit / CLOSE_ENOUGH <= rate <= limit
    assert [point.requested for point in found.points if point.arm == "none"] == sorted(
        rate for name, rate in asked if name == "none"
    )
    write_rates(tmp_path, found)
    assert (
        "Highest measured rate with 95% of the requests within the bounds (ttft_ms 100)"
        in (tmp_path / "rates.md").read_text()
    )
    with pytest.raises(WorkloadError, match="a rate can only be found for bounds"):
        find(Workload.model_validate(small_workload()), ["none"], 1.0, run, tmp_path)


def test_rates_of_a_running_server(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmc.bench.selfcheck.LAG_MS", math.inf)  # how much the client lags depends on the machine
    few = ["--requests", "4", "--prompt-tokens", "20", "--output-tokens", "2", "--slo", "ttft_ms=60000"]
    server = Strict()
    with serving(server) as url:
        command = ["bench", "--url", url, "--model", "m", "--tokenizer", str(model_folder), "--out", str(tmp_path)]
        result = CliRunner().invoke(app, [*command, *few, "--rates", "40,80"])
    assert result.exit_code == 0, (result.output, result.exception)
    points = json.loads((tmp_path / "rates.json").read_text())["points"]
    assert [(point["requested"], point["holds"]) for point in points] == [(40.0, True), (80.0, True)]
    assert (tmp_path / "latency-over-throughput.png").is_file()
    assert (tmp_path / "rate-40" / "results.json").is_file()
    asked = [body["prompt"] for body in server.bodies]
    prompts = [tuple(prompt) for prompt in asked if isinstance(prompt, list) and len(prompt) == 20]  # text warms up
    assert len(set(prompts)) == 8, "four prompts of each rate, none of them known from the rate before"


def test_the_highest_rate_of_a_running_server(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search ends at the most runs, since no rate is too high for these bounds."""
    monkeypatch.setattr("lmc.bench.selfcheck.LAG_MS", math.inf)
    monkeypatch.setattr("lmc.bench.rates.MOST_RUNS", 3)
    few = ["--requests", "4", "--prompt-tokens", "20", "--output-tokens", "2", "--slo", "ttft_ms=60000"]
    with serving(Strict()) as url:
        command = ["bench", "--url", url, "--model", "m", "--tokenizer", str(model_folder), "--out", str(tmp_path)]
        result = CliRunner().invoke(app, [*command, *few, "--find-rate", "--rate", "40"])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "rates.json").read_text())
    assert [point["requested"] for point in found["points"]] == [40.0, 80.0, 160.0]
    assert "bounds (ttft_ms 60000), in requests/s: server 160." in result.output


@pytest.mark.parametrize("chosen", [["--rates", "40"], ["--find-rate", "--rate", "40"]], ids=["rates", "find"])
def test_an_invalid_run_is_said_and_ends_with_1(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: list[str]
) -> None:
    monkeypatch.setattr("lmc.bench.selfcheck.LAG_MS", -1.0)  # the client always lags
    monkeypatch.setattr("lmc.bench.selfcheck.LAG_SHARE", -1.0)
    monkeypatch.setattr("lmc.bench.rates.MOST_RUNS", 1)
    few = ["--requests", "4", "--prompt-tokens", "20", "--output-tokens", "2", "--slo", "ttft_ms=60000"]
    with serving(Strict()) as url:
        command = ["bench", "--url", url, "--model", "m", "--tokenizer", str(model_folder), "--out", str(tmp_path)]
        result = CliRunner().invoke(app, [*command, *few, *chosen])
    assert result.exit_code == 1, (result.output, result.exception)
    assert "INVALID: 40 requests/s: arm server: " in result.output
    assert "INVALID: 40 requests/s: arm server: " in (tmp_path / "rates.md").read_text()


def test_rates_are_either_given_or_found() -> None:
    result = CliRunner().invoke(app, ["bench", "absent.yaml", "--rates", "1,2", "--find-rate"])
    assert (result.exit_code, str(result.exception)) == (1, "give either --rates or --find-rate")


@pytest.mark.parametrize(
    ("arms", "said"),
    [(["typo"], "no arm 'typo' in this workload"), (["lmc-restarted"], "arm lmc-restarted restarts lmc")],
)
def test_a_rate_is_found_of_arms_that_can_be_chosen(tmp_path: Path, arms: list[str], said: str) -> None:
    def run(load: Workload, names: Sequence[str]) -> tuple[Results, list[RequestRecord]]:
        raise AssertionError("no run")

    workload = Workload.model_validate(small_workload(slo={"ttft_ms": 100}))
    with pytest.raises(WorkloadError, match=said):
        find(workload, arms, 1.0, run, tmp_path)
