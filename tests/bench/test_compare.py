from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from lmc.bench.compare import compare_runs
from lmc.bench.prediction import predict
from lmc.bench.records import RequestRecord, Results, write_results
from lmc.bench.workload import Arm
from lmc.cli import app
from lmc.errors import RunError
from tests.bench.conftest import RunSmall
from tests.bench.test_outputs_and_stats import record

ARMS = {"none": {"reuse": "none", "args": ["--no-enable-prefix-caching"]}, "lmc": {"reuse": "cache", "cache": {}}}


def _slower(records: list[RequestRecord], factor: float) -> list[RequestRecord]:
    return [
        replace(
            r, ttft_ms=(r.ttft_ms or 0) * factor, e2e_ms=(r.e2e_ms or 0) * factor, service_ttft_ms=r.service_ttft_ms
        )
        for r in records
    ]


@pytest.fixture
def small(run_small: RunSmall) -> tuple[Results, list[RequestRecord]]:
    return run_small(bars=[], arms=ARMS)


def test_a_slower_run_is_worse_and_a_run_with_itself_undecided(
    small: tuple[Results, list[RequestRecord]], tmp_path: Path
) -> None:
    results, records = small
    write_results(tmp_path / "a", results, records)
    write_results(tmp_path / "b", results, _slower(records, 3.0))
    comparisons, outputs = compare_runs(tmp_path / "a", tmp_path / "b")
    verdicts = {(c.a.split(" ")[0], c.metric): c.verdict for c in comparisons}
    assert verdicts["none", "ttft_p50"] == verdicts["lmc", "e2e_p50"] == verdicts["lmc", "throughput"] == "worse"
    assert all(not output.differences and output.compared_tokens == 44 for output in outputs)
    same, _ = compare_runs(tmp_path / "a", tmp_path / "a", ["lmc"])
    assert {c.verdict for c in same} == {"undecided"}
    assert {round(c.ratio, 9) for c in same} == {1.0}


def test_command_fails_on_worse_only_when_asked(small: tuple[Results, list[RequestRecord]], tmp_path: Path) -> None:
    results, records = small
    write_results(tmp_path / "a", results, records)
    write_results(tmp_path / "b", results, _slower(records, 3.0))
    command = ["bench", "compare", str(tmp_path / "a"), str(tmp_path / "b")]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, [*command, "--fail-on-worse"]).exit_code == 1
    shown = CliRunner().invoke(app, [*command, "--json"])
    assert orjson.loads(shown.stdout)["comparisons"][0]["verdict"] == "worse"
    rendered = CliRunner().invoke(app, ["bench", "report", str(tmp_path / "a")])
    assert rendered.exit_code == 0
    assert (tmp_path / "a" / "report.html").is_file()


def test_bars_of_an_older_run_are_judged_again(run_small: RunSmall, tmp_path: Path) -> None:
    """It had no intervals: its verdicts compared ratios only."""
    bar = {"a": "lmc", "b": "none", "over": "random", "at_most": 10}  # three sessions
    results, records = run_small(bars=[bar], arms=ARMS)
    old = [replace(result, met=True, low=None, high=None) for result in results.bars]
    write_results(tmp_path / "old", replace(results, bars=old), records)
    assert CliRunner().invoke(app, ["bench", "report", str(tmp_path / "old")]).exit_code == 0
    [row] = [
        line for line in (tmp_path / "old" / "report.md").read_text().splitlines() if "over part random <= 10" in line
    ]
    assert row.endswith("| undecided |")


def test_runs_that_prove_nothing_are_refused(small: tuple[Results, list[RequestRecord]], tmp_path: Path) -> None:
    results, records = small
    write_results(tmp_path / "a", results, records)
    write_results(tmp_path / "bad", replace(results, valid=False, problems=["it lagged"]), records)
    with pytest.raises(RunError, match="this run is invalid, so it cannot be compared: it lagged"):
        compare_runs(tmp_path / "a", tmp_path / "bad")
    write_results(tmp_path / "other", results, [replace(r, prompt_tokens=r.prompt_tokens + 1) for r in records])
    with pytest.raises(RunError, match="they replayed different workloads"):
        compare_runs(tmp_path / "a", tmp_path / "other")
    with pytest.raises(RunError, match="arm 'x' is not in both runs; choose one that is: none, lmc"):
        compare_runs(tmp_path / "a", tmp_path / "a", ["x"])
    with pytest.raises(RunError, match="cannot read"):
        compare_runs(tmp_path / "a", tmp_path / "absent")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text('{"schema_version": 0}')
    with pytest.raises(RunError, match="not a result of this version"):
        compare_runs(tmp_path / "old", tmp_path / "a")


def test_the_cost_model_predicts_what_it_was_not_shown() -> None:
    def ttft(new: int) -> float:
        return 20.0 + 2.5 * new

    lengths = [500, 900, 1300, 1700, 2100]
    none = [record("none", f"p/{i}/0", prompt_tokens=n, service_ttft_ms=ttft(n)) for i, n in enumerate(lengths)]
    lmc = [
        record(
            "lmc", f"p/{i}/0", prompt_tokens=n, cached_tokens=384, expected_hit_tokens=384,
            service_ttft_ms=ttft(n - 384) + 3.84, load_ms=3.84, load_bytes=384 * 46_080.0,
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    predictions = {p.arm: p for p in predict({"none": Arm(), "lmc": Arm(cache={})}, {"none": none, "lmc": lmc})}
    assert predictions["lmc"].predicted_ttft_p50_ms == pytest.approx(ttft(1300 - 384) + 3.84, rel=0.01)
    assert predictions["lmc"].load_bytes_per_s == pytest.approx(46_080 / 1e-5)
    assert predictions["lmc"].expected_hit_tokens == predictions["lmc"].measured_hit_tokens == 5 * 384
    assert predictions["none"].predicted_ttft_p50_ms == pytest.approx(ttft(1300), rel=0.01)
    alone = predict({"lmc": Arm(cache={})}, {"lmc": lmc})[0]
    assert alone.predicted_ttft_p50_ms is None
    assert alone.expected_hit_tokens == 5 * 384


def test_a_series_is_judged_by_its_last_run(small: tuple[Results, list[RequestRecord]], tmp_path: Path) -> None:
    results, records = small
    for name, factor in (("a", 1.0), ("slow", 3.0), ("fine", 1.0)):
        write_results(tmp_path / name, results, _slower(records, factor))
    first, slow, fine = (str(tmp_path / name) for name in ("a", "slow", "fine"))
    command = ["bench", "compare", first, "--fail-on-worse", "--png", str(tmp_path / "trend.png")]
    recovered = CliRunner().invoke(app, [*command, slow, fine, "--json"])
    assert recovered.exit_code == 0, recovered.output
    judged = {
        (c["a"].rpartition("/")[2], c["metric"]): c["verdict"] for c in orjson.loads(recovered.stdout)["comparisons"]
    }
    assert judged["slow", "ttft_p50"] == "worse" and judged["fine", "ttft_p50"] == "undecided"
    assert (tmp_path / "trend.png").read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(app, [*command, fine, slow]).exit_code == 1
