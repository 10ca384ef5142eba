"""Renders results as a report: tables, pictures, one page. Everything in it is computed from results.json and requests.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmc import report
from lmc.bench import plots
from lmc.bench.bars import judged_again
from lmc.bench.records import ArmResult, RequestRecord, Results
from lmc.bench.tables import (
    PARTS,
    arms_table,
    attributed,
    attribution_table,
    bars_table,
    comparisons_table,
    hits_table,
    misses_table,
    outputs_table,
    parts_table,
    phases_table,
    prediction_table,
    self_check_table,
    tier_names,
)
from lmc.report import Figure, Report, Section, Table, Tile
from lmc.units import format_seconds


def write_report(folder: Path, results: Results, records: Sequence[RequestRecord]) -> None:
    """Write report.html, report.md, the pictures and arms.csv beside results.json."""
    page = build_report(results, records)
    report.write_file(folder / "report.html", report.report_html(page))
    report.write_file(folder / "report.md", report.report_markdown(page))
    report.write_pictures(folder, page)
    report.write_file(folder / "arms.csv", report.table_csv(arms_table(results)))


def build_report(results: Results, records: Sequence[RequestRecord]) -> Report:
    results = judged_again(results, records)
    sections = [Section("Arms", _arms_text(results), [arms_table(results), hits_table(results)])]
    if results.bars:
        sections.append(Section("Bars", "Ratios within this run.", [bars_table(results)]))
    if results.comparisons:
        sections.append(Section("Comparisons", COMPARISONS_TEXT, [comparisons_table(results.comparisons)]))
    sections.append(Section("Sim meets bench", PREDICTION_TEXT, [prediction_table(results)]))
    if groups := attributed(results, records):
        shown: list[Table | Figure] = [attribution_table(results, records), plots.ttft_parts(groups, PARTS)]
        misses = misses_table(results, records)
        shown += [misses] if misses.rows else []
        sections.append(Section("Where the time to first token went", ATTRIBUTION_TEXT, shown))
    if results.outputs:
        sections.append(Section("Outputs", OUTPUTS_TEXT, [outputs_table(results.outputs)]))
    if pictures := _figures(results, records):
        sections.append(Section("Pictures", "", pictures))
    sections.append(Section("Parts", "", [parts_table(results)]))
    sections.append(Section("Self-check", SELF_CHECK_TEXT, [self_check_table(results), phases_table(results)]))
    by_arm = answered(results, records)
    return Report(
        f"lmc bench: {results.name}", summary(results), sections, _metadata(results), tiles(results),
        plots.ttft_distribution(by_arm),
    )  # fmt: skip


def gain(results: Results, arm: ArmResult) -> str | None:
    """One sentence about what an arm gained on the requests with a hit, or over all if every request had one."""
    mine = [c for c in results.comparisons if c.a == arm.name and c.metric == "ttft_p50" and c.over in ("hits", "all")]
    found = next((c for c in mine if c.over == "hits"), next(iter(mine), None))
    if found is None or not arm.hit_tokens:
        return None
    over = "Over the requests with a hit" if found.over == "hits" else "Over all requests"
    verdict = {"better": "faster", "worse": "slower", "undecided": "undecided"}[found.verdict]
    interval = f"95 % interval {found.low:.2f} to {found.high:.2f}, {found.samples} requests"
    return (
        f"{over}, the median TTFT of {found.a} is {found.ratio:.2f} of {found.b}'s ({verdict}; {interval}); "
        f"{arm.hit_tokens / arm.prompt_tokens:.0%} of its prompt tokens hit."
    )


def subject(results: Results) -> ArmResult:
    """The arm that the report is about: the first one with lmc, else the first that is compared with another."""
    with_lmc = [arm for arm in results.arms[1:] if arm.settings.get("cache") is not None]
    return [*with_lmc, *results.arms[1:], *results.arms][0]


def tiles(results: Results) -> list[Tile]:
    arm = subject(results)
    found = [Tile("VALID" if results.valid else "INVALID", "hits, outputs and client were checked")]
    if arm.hit_tokens is not None and arm.prompt_tokens:
        found.append(Tile(f"{arm.hit_tokens / arm.prompt_tokens:.0%}", f"of {arm.name}'s prompt tokens hit"))
    if (p50 := arm.ttft_ms.get("p50")) is not None:
        first = results.arms[0]
        beside = f"; {first.ttft_ms['p50']:,.0f} ms of {first.name}" if first is not arm and first.ttft_ms else ""
        found.append(Tile(f"{p50:,.0f} ms", f"median TTFT of {arm.name}, all requests{beside}"))
    if results.bars:
        met, missed = (sum(bar.met is verdict for bar in results.bars) for verdict in (True, False))
        undecided = len(results.bars) - met - missed
        found.append(Tile(f"{met} of {len(results.bars)}", f"bars met, {missed} NOT met, {undecided} undecided"))
    return found


def summary(results: Results) -> str:
    lines = [gain(results, subject(results)) or "", str(results.workload.get("about", "")).strip()]
    if results.valid:
        believe = "VALID: the hits are those that the simulator expects, the outputs agree, and the client kept up."
    else:
        believe = "INVALID: " + "; ".join(results.problems)
    lines.insert(1, believe)
    return "\n\n".join(line for line in lines if line)


COMPARISONS_TEXT = (
    "The ratio is a / b over the requests that both arms answered, with a 95 % interval from a bootstrap over sessions (the same resample "
    "for both arms). A verdict needs an interval that lies more than 3 % from 1 as a whole, and at least 6 sessions, of which most lean "
    "one way by a sign test. A p90 needs 50 requests, a p99 needs 500. Where hits and random prompts are in one load, the row over all "
    "requests is a mixture: look at the rows over hits and over one part."
)
PREDICTION_TEXT = (
    "Hits are predicted by replaying the same prompts through a cache of the arm's size. Times are predicted by the simulator's cost "
    "model: its prefill part is fitted on the arms without lmc, its load rate comes from lmc's counters, and it does not use the measured "
    "times of the arms with lmc. Break even is the shortest prefix that is loaded faster than it is computed."
)
ATTRIBUTION_TEXT = (
    "The times are per request, from the real send to the first token; requests.csv has each of them. With lmc the parts come from its "
    "spans, joined by request id: queue is the time outside the cache until the engine took the request in (network and handling "
    "included), lookup is the wait for remote tiers and for staging, load is the copy into the engine's memory, rest is the prefill of the "
    "tokens that were not loaded and the way back. Without lmc the parts come from the engine's counters, if one request ran at a time: "
    "queue ends with the first scheduling. Staging (from disk or a remote tier into host memory) is the sum over parallel threads."
)
OUTPUTS_TEXT = (
    "The greedy tokens of every request are compared token by token. A tie is a place where the reference arm's two best log-probabilities "
    "are closer than 1e-3 and the arm took the other token; any other difference is an error."
)
SELF_CHECK_TEXT = (
    "These figures tell whether the client was fast enough. Send lag is the time from the intended to the real send; "
    "loop lag is the time by which the event loop wakes up too late."
)


def answered(results: Results, records: Sequence[RequestRecord]) -> dict[str, list[RequestRecord]]:
    return {arm.name: [record for record in records if record.arm == arm.name and record.ok] for arm in results.arms}


def _figures(results: Results, records: Sequence[RequestRecord]) -> list[Table | Figure]:
    by_arm = answered(results, records)
    figures: list[Table | Figure] = []
    counted = {arm: mine for arm, mine in by_arm.items() if any(record.cached_tokens is not None for record in mine)}
    if counted:
        figures += [plots.ttft_against_hits(counted), plots.hit_rate_over_time(counted)]
    if tiers := tier_names(results.arms):
        figures.append(plots.hits_per_tier({arm.name: arm.hit_tokens_by_tier for arm in results.arms}, tiers))
    return figures


def _arms_text(results: Results) -> str:
    abouts = [f"{arm.name}: {arm.about}" for arm in results.arms if arm.about]
    notes = [
        f"Of {arm.name} not everything can be measured: {'; '.join(arm.notes)}." for arm in results.arms if arm.notes
    ]
    others = [said for arm in results.arms[1:] if arm is not subject(results) and (said := gain(results, arm))]
    return "\n\n".join([*abouts, *others, *notes])


def _metadata(results: Results) -> dict[str, str]:
    return {
        "command": results.command,
        "started": results.started,
        "took": format_seconds(results.seconds),
        "order": "the arms took turns after each stretch of the load (ABBA)"
        if results.interleaved
        else "one arm after the other",
        "model": results.model,
        **results.hardware,
        **results.lmc,
        "data": str(results.workload.get("licence", "")),
        "seed": str(results.workload.get("seed")),
        **{f"arm {arm.name}": arm.command for arm in results.arms},
    }
