"""From results to a report: tables, pictures, one page. Everything shown is computed from results.json and requests.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmc import report
from lmc.bench import plots
from lmc.bench.records import RequestRecord, Results
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
from lmc.report import Figure, Report, Section, Table
from lmc.units import format_seconds


def write_report(folder: Path, results: Results, records: Sequence[RequestRecord]) -> None:
    """report.html, report.md, the pictures and arms.csv beside results.json."""
    page = build_report(results, records)
    report.write_file(folder / "report.html", report.report_html(page))
    report.write_file(folder / "report.md", report.report_markdown(page))
    report.write_pictures(folder, page)
    report.write_file(folder / "arms.csv", report.table_csv(arms_table(results)))


def build_report(results: Results, records: Sequence[RequestRecord]) -> Report:
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
    sections.append(Section("Pictures", "", _figures(results, records)))
    sections.append(Section("Parts", "", [parts_table(results)]))
    sections.append(Section("Self-check", SELF_CHECK_TEXT, [self_check_table(results), phases_table(results)]))
    return Report(f"lmc bench: {results.name}", summary(results), sections, _metadata(results))


def summary(results: Results) -> str:
    lines = [str(results.workload.get("about", "")).strip()]
    if results.valid:
        lines.append("VALID: hits are those the simulator expects, outputs agree, the client kept up.")
    else:
        lines.append("INVALID: " + "; ".join(results.problems))
    return "\n\n".join(line for line in lines if line)


COMPARISONS_TEXT = (
    "Ratio a / b over the requests that both arms answered, with a 95 % interval from a bootstrap over sessions (the same resample "
    "for both arms). A verdict needs the whole interval to lie more than 3 % from 1, and sessions that lean one way by a sign test "
    "(6 at least). p90 needs 50 requests, p99 needs 500."
)
PREDICTION_TEXT = (
    "Hits: the simulator replays the very prompts through a cache of the arm's size. Time: its cost model; the prefill part is "
    "fitted on the arms without lmc, the load rate is what lmc's counters showed, and the measured times of the arms with lmc are "
    "unknown to it. Break even: the shortest prefix that is loaded faster than it is computed."
)
ATTRIBUTION_TEXT = (
    "Per request, from the real send to the first token; requests.csv has every one of them. With lmc the parts come from its spans, "
    "joined by request id: queue is everything until the cache was asked and the engine took the request in (network and handling too), "
    "lookup is the wait for remote tiers and for staging, load is the copy into the engine's memory, rest is the prefill of what was not "
    "loaded and the way back. Without lmc they come from the engine's counters, where one request ran at a time: queue ends with the first "
    "scheduling. Staging (from disk or a remote tier into host memory) adds up threads that run side by side."
)
OUTPUTS_TEXT = (
    "Greedy tokens of every request, token by token. A tie is a place where the reference arm's two best log-probabilities lie closer than "
    "1e-3 and the arm took the other one; anything else is an error."
)
SELF_CHECK_TEXT = (
    "Was the client good enough? Send lag is the time from the intended to the real send; "
    "loop lag is how late the event loop wakes."
)


def _figures(results: Results, records: Sequence[RequestRecord]) -> list[Table | Figure]:
    by_arm = {arm.name: [record for record in records if record.arm == arm.name and record.ok] for arm in results.arms}
    figures: list[Table | Figure] = [plots.ttft_distribution(by_arm), plots.ttft_against_hits(by_arm)]
    figures.append(plots.hit_rate_over_time(by_arm))
    figures.append(
        plots.hits_per_tier({arm.name: arm.hit_tokens_by_tier for arm in results.arms}, tier_names(results.arms))
    )
    return figures


def _arms_text(results: Results) -> str:
    return "\n\n".join(f"{arm.name}: {arm.about}" for arm in results.arms if arm.about)


def _metadata(results: Results) -> dict[str, str]:
    return {
        "command": results.command,
        "started": results.started,
        "took": format_seconds(results.seconds),
        "order": "arms took turns, block by block (ABBA)" if results.interleaved else "one arm after the other",
        "model": results.model,
        **results.hardware,
        **results.lmc,
        "data": str(results.workload.get("licence", "")),
        "seed": str(results.workload.get("seed")),
        **{f"arm {arm.name}": arm.command for arm in results.arms},
    }
