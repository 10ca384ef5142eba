"""Measures a workload at several rates, or finds the highest rate at which each arm holds the workload's SLOs.

Every rate is a run of its own, with new engines. A server that already runs gets another seed for each rate, because it still holds the
prompts of the rate before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmc.bench.plots import latency_over_throughput
from lmc.bench.records import ArmResult, RequestRecord, Results, write_results
from lmc.bench.run import chosen_arms
from lmc.bench.workload import OpenLoop, Slo, TraceTimes, Users, Workload
from lmc.errors import WorkloadError
from lmc.report import (
    Cell,
    Column,
    Report,
    Section,
    Table,
    report_html,
    report_markdown,
    to_json,
    write_file,
    write_pictures,
)

HOLDS_SHARE = 0.95  # of the requests that must keep every bound
CLOSE_ENOUGH = 1.1  # of the lowest rate that fails to the highest that holds
MOST_RUNS = 12  # of one arm
Run = Callable[[Workload, Sequence[str]], tuple[Results, list[RequestRecord]]]


@dataclass(frozen=True)
class RatePoint:
    """One arm at one rate. `holds` is None if the workload has no SLO. Rates are in requests/s."""

    arm: str
    requested: float
    achieved: float
    output_tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p90_ms: float | None
    tpot_p50_ms: float | None
    within_slo: float | None
    holds: bool | None
    problems: list[str]


@dataclass(frozen=True)
class RateResults:
    name: str
    slo: dict[str, Any]  # Any: numbers or None
    points: list[RatePoint]
    highest: dict[str, float | None]  # by arm: the highest rate that held the SLOs
    problems: list[str]  # why runs are INVALID, each with its rate
    metadata: dict[str, str]


def at_rate(workload: Workload, rate: float, number: int) -> Workload:
    """The workload at this rate of sessions (users: of turns); `number` counts the rates. A closed loop becomes a Poisson process."""
    load = workload.load
    if isinstance(load, OpenLoop | Users):
        changed: OpenLoop | Users = load.model_copy(update={"rate": rate})
    elif isinstance(load, TraceTimes):
        raise WorkloadError(
            "load.kind trace has the data's own times; change its `speed`, or choose another load for rates"
        )
    else:
        changed = OpenLoop(kind="poisson", rate=rate)
    runs_already = any(arm.url for arm in workload.arms.values())
    seed = workload.seed + number if runs_already else workload.seed
    return workload.model_copy(update={"load": changed, "interleave": None, "bars": [], "seed": seed})


def sweep(workload: Workload, arms: Sequence[str], rates: Sequence[float], run: Run, folder: Path) -> RateResults:
    """Measure every arm at every rate."""
    points: list[RatePoint] = []
    problems: list[str] = []
    metadata: dict[str, str] = {}
    for number, rate in enumerate(rates):
        results = _measured(at_rate(workload, rate, number), arms, run, folder / f"rate-{rate:g}")
        metadata = _metadata(results)
        points += [_point(arm, rate, results) for arm in results.arms]
        problems += _problems(rate, results)
    return _collected(workload, points, problems, metadata)


def find(workload: Workload, arms: Sequence[str], first: float, run: Run, folder: Path) -> RateResults:
    """Search the highest rate of each arm by doubling or halving from `first`, then by bisection; restarted arms are left out.

    Raises WorkloadError without an SLO, and for arms that cannot be chosen.
    """
    if not any(workload.slo.model_dump().values()):
        raise WorkloadError("a rate can only be found for bounds; give --slo ttft_ms=500, or slo in the workload")
    chosen = [name for name in chosen_arms(workload, arms) if workload.arms[name].restart_of is None]
    points: list[RatePoint] = []
    problems: list[str] = []
    metadata: dict[str, str] = {}
    for arm in chosen:
        known: dict[float, bool] = {}
        while (rate := next_rate(known, first)) is not None:
            plan = at_rate(workload, rate, len(points))
            results = _measured(plan, [arm], run, folder / f"{arm}-rate-{rate:.4g}")
            metadata = _metadata(results)
            points.append(_point(results.arms[0], rate, results))
            problems += _problems(rate, results)
            known[rate] = bool(points[-1].holds)
    return _collected(workload, points, problems, metadata)


def next_rate(known: dict[float, bool], first: float) -> float | None:
    """The rate to try next, or None at the end. `known` tells of each tried rate whether the SLOs held."""
    if not known:
        return first
    if len(known) >= MOST_RUNS:
        return None
    good = max((rate for rate, held in known.items() if held), default=None)
    bad = min((rate for rate, held in known.items() if not held and (good is None or rate > good)), default=None)
    if bad is None:
        return (good or first) * 2
    if good is None:
        return bad / 2
    return (good * bad) ** 0.5 if bad / good > CLOSE_ENOUGH else None


def parse_rates(text: str) -> list[float]:
    """Raises WorkloadError unless the text is positive numbers, separated by commas."""
    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise WorkloadError(f"--rates: {text!r} is not a list of rates; write positive numbers such as 1,2,4")
    return rates


def parse_slo(text: str) -> Slo:
    """ "ttft_ms=500,tpot_ms=50". Raises WorkloadError."""
    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            bounds[name.strip()] = float(value)
        except ValueError:
            raise WorkloadError(f"--slo: {part!r} is not a bound; write ttft_ms=500,tpot_ms=50") from None
    unknown = set(bounds) - set(Slo.model_fields)
    if unknown or not all(0 < bound < math.inf for bound in bounds.values()):
        raise WorkloadError(
            f"--slo: {text!r} is wrong; bounds are positive, and there are {', '.join(Slo.model_fields)}"
        )
    return Slo(**bounds)


def write_rates(folder: Path, results: RateResults) -> None:
    """Write rates.json, and a report with the picture of latency over throughput."""
    page = _report(results)
    write_file(folder / "rates.json", to_json(asdict(results)))
    write_file(folder / "rates.html", report_html(page))
    write_file(folder / "rates.md", report_markdown(page))
    write_pictures(folder, page)


def rates_table(results: RateResults) -> Table:
    columns = [
        Column("arm"), Column("requested", "requests/s"), Column("achieved", "requests/s"), Column("output", "tokens/s", 1),
        Column("TTFT p50", "ms", 0), Column("TTFT p90", "ms", 0), Column("TPOT p50", "ms", 1),
        Column("within the SLOs", "%", 1), Column("problems"),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [
            p.arm, p.requested, p.achieved, p.output_tokens_per_s, p.ttft_p50_ms, p.ttft_p90_ms, p.tpot_p50_ms,
            None if p.within_slo is None else 100 * p.within_slo, "; ".join(p.problems) or None,
        ]
        for p in results.points
    ]  # fmt: skip
    return Table("Rates", columns, rows)


def summary(results: RateResults) -> str:
    if not results.highest:
        return "The workload has no SLO, so no rate is too high."
    bounds = ", ".join(f"{name} {value:g}" for name, value in results.slo.items() if value is not None)
    said = [f"{arm} {'none' if rate is None else f'{rate:.3g}'}" for arm, rate in results.highest.items()]
    return f"Highest measured rate with {HOLDS_SHARE:.0%} of the requests within the bounds ({bounds}), in requests/s: {'; '.join(said)}."


def _measured(workload: Workload, arms: Sequence[str], run: Run, folder: Path) -> Results:
    results, records = run(workload, arms)
    write_results(folder, results, records)
    return results


def _problems(rate: float, results: Results) -> list[str]:
    return [f"{rate:.4g} requests/s: {problem}" for problem in results.problems]


def _point(arm: ArmResult, rate: float, results: Results) -> RatePoint:
    check = arm.self_check
    within = arm.goodput_share
    return RatePoint(
        arm=arm.name,
        requested=rate,
        achieved=0.0 if check is None else check.achieved_rate,
        output_tokens_per_s=arm.output_tokens_per_s,
        ttft_p50_ms=arm.ttft_ms.get("p50"),
        ttft_p90_ms=arm.ttft_ms.get("p90"),
        tpot_p50_ms=arm.tpot_ms.get("p50"),
        within_slo=within,
        holds=None if within is None else within >= HOLDS_SHARE,
        problems=arm.problems,
    )


def _collected(
    workload: Workload, points: Sequence[RatePoint], problems: list[str], metadata: dict[str, str]
) -> RateResults:
    ordered = sorted(points, key=lambda point: (list(workload.arms).index(point.arm), point.requested))
    highest: dict[str, float | None] = {}
    if any(workload.slo.model_dump().values()):
        for arm in dict.fromkeys(point.arm for point in ordered):
            highest[arm] = max(_held(ordered, arm), default=None)
    return RateResults(workload.name, workload.slo.model_dump(), ordered, highest, problems, metadata)


def _held(points: Sequence[RatePoint], arm: str) -> Iterator[float]:
    """The rates of an arm up to the first that failed: one that held beyond it was luck."""
    for point in points:
        if point.arm == arm:
            if not point.holds:
                return
            yield point.requested


def _metadata(results: Results) -> dict[str, str]:
    return {"command": results.command, "model": results.model, **results.hardware, **results.lmc}


def _report(results: RateResults) -> Report:
    series = {
        arm: [point for point in results.points if point.arm == arm]
        for arm in dict.fromkeys(point.arm for point in results.points)
    }
    lines = {
        arm: [(p.achieved, p.output_tokens_per_s, p.ttft_p50_ms, p.ttft_p90_ms, p.tpot_p50_ms) for p in points]
        for arm, points in series.items()
    }
    section = Section(
        "Latency over throughput", "", [latency_over_throughput(lines, results.slo), rates_table(results)]
    )
    said = "\n\n".join([summary(results), *(f"INVALID: {problem}" for problem in results.problems)])
    return Report(f"lmc bench: {results.name} at several rates", said, [section], results.metadata)
