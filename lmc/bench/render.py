"""From results to a report: tables, pictures, one page. Everything shown is computed from results.json and requests.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmc import report
from lmc.bench import plots
from lmc.bench.records import ArmResult, RequestRecord, Results
from lmc.report import Cell, Column, Figure, Report, Section, Table
from lmc.units import format_seconds


def write_report(folder: Path, results: Results, records: Sequence[RequestRecord]) -> None:
    """report.html, report.md and arms.csv beside results.json."""
    page = build_report(results, records)
    report.write_file(folder / "report.html", report.report_html(page))
    report.write_file(folder / "report.md", report.report_markdown(page))
    report.write_file(folder / "arms.csv", report.table_csv(arms_table(results)))


def build_report(results: Results, records: Sequence[RequestRecord]) -> Report:
    sections = [Section("Arms", _arms_text(results), [arms_table(results), hits_table(results)])]
    if results.bars:
        sections.append(Section("Bars", "Ratios within this run.", [bars_table(results)]))
    if results.comparisons:
        sections.append(Section("Comparisons", COMPARISONS_TEXT, [comparisons_table(results)]))
    if results.outputs:
        sections.append(Section("Outputs", OUTPUTS_TEXT, [outputs_table(results)]))
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
    "Ratio a / b over the requests that both arms answered, with a 95 % interval from a bootstrap over sessions (the same resample for "
    "both arms). A verdict needs the whole interval to lie more than 3 % from 1; fewer than 5 sessions are never enough. p90 needs 50 "
    "requests, p99 needs 500."
)
OUTPUTS_TEXT = (
    "Greedy tokens of every request, token by token. A tie is a place where the reference arm's two best log-probabilities lie closer than "
    "1e-3 and the arm took the other one; anything else is an error."
)
SELF_CHECK_TEXT = (
    "Was the client good enough? Send lag is the time from the intended to the real send; "
    "loop lag is how late the event loop wakes."
)


def arms_table(results: Results) -> Table:
    columns = [
        Column("arm"),
        Column("valid"),
        Column("answered"),
        Column("prompt", "tokens"),
        Column("hit", "tokens"),
        Column("expected hit", "tokens"),
        Column("hit rate", "%", 1),
        Column("TTFT p50", "ms", 0),
        Column("TTFT p90", "ms", 0),
        Column("TPOT p50", "ms", 1),
        Column("end to end p50", "ms", 0),
        Column("output", "tokens/s", 1),
        Column("goodput", "%", 1),
    ]
    rows: list[list[Cell]] = [
        [
            arm.name,
            "yes" if arm.valid else "INVALID",
            f"{arm.ok} of {arm.requests}",
            arm.prompt_tokens,
            arm.hit_tokens,
            arm.expected_hit_tokens,
            _percent(arm.hit_tokens, arm.prompt_tokens),
            arm.ttft_ms.get("p50"),
            arm.ttft_ms.get("p90"),
            arm.tpot_ms.get("p50"),
            arm.e2e_ms.get("p50"),
            arm.output_tokens_per_s,
            None if arm.goodput_share is None else arm.goodput_share * 100,
        ]
        for arm in results.arms
    ]
    used = [index for index in range(len(columns)) if any(row[index] is not None for row in rows)]
    columns, rows = [columns[index] for index in used], [[row[index] for index in used] for row in rows]
    return Table("Figures per arm", columns, rows, "Hit rate: hit tokens / prompt tokens of answered requests.")


def brief_table(results: Results) -> Table:
    """The arms in the width of a terminal."""
    columns = [
        Column("arm"),
        Column("valid"),
        Column("answered"),
        Column("hit rate", "%", 1),
        Column("TTFT p50", "ms", 0),
        Column("p90", "ms", 0),
        Column("TPOT p50", "ms", 1),
        Column("TTFT p50, ratio", "", 3),
    ]
    first = results.arms[0].ttft_ms.get("p50")
    rows: list[list[Cell]] = [
        [
            arm.name,
            "yes" if arm.valid else "INVALID",
            f"{arm.ok} of {arm.requests}",
            _percent(arm.hit_tokens, arm.prompt_tokens),
            arm.ttft_ms.get("p50"),
            arm.ttft_ms.get("p90"),
            arm.tpot_ms.get("p50"),
            arm.ttft_ms["p50"] / first if first and arm.ttft_ms else None,
        ]
        for arm in results.arms
    ]
    return Table(results.name, columns, rows, f"Ratio: to {results.arms[0].name}.")


def hits_table(results: Results) -> Table:
    tiers = _tiers(results.arms)
    columns = [Column("arm"), *(Column(tier, "tokens") for tier in tiers), Column("all", "tokens")]
    rows: list[list[Cell]] = [
        [arm.name, *(arm.hit_tokens_by_tier.get(tier) for tier in tiers), arm.hit_tokens] for arm in results.arms
    ]
    note = "Tiers are counted by the engine (device) and by lmc; `all` is what the responses report."
    return Table("Hit tokens by tier", columns, rows, note)


def bars_table(results: Results) -> Table:
    columns = [Column("bar"), Column("ratio", "", 3), Column("requests"), Column("verdict")]
    verdicts = {True: "met", False: "NOT met", None: "no such request"}
    rows: list[list[Cell]] = [[bar.text, bar.ratio, bar.samples, verdicts[bar.met]] for bar in results.bars]
    return Table("Bars of this workload", columns, rows)


def comparisons_table(results: Results) -> Table:
    columns = [
        Column("a"),
        Column("b"),
        Column("metric"),
        Column("a / b", "", 3),
        Column("low", "", 3),
        Column("high", "", 3),
        Column("a is"),
        Column("requests"),
    ]
    rows: list[list[Cell]] = [
        [c.a, c.b, c.metric, c.ratio, c.low, c.high, c.verdict, c.samples] for c in results.comparisons
    ]
    return Table("Paired comparison with the first arm", columns, rows)


def outputs_table(results: Results) -> Table:
    columns = [
        Column("arm"),
        Column("against"),
        Column("requests"),
        Column("tokens compared"),
        Column("ties"),
        Column("differences"),
    ]
    rows: list[list[Cell]] = [
        [o.arm, o.reference, o.compared_requests, o.compared_tokens, o.ties, len(o.differences)]
        for o in results.outputs
    ]
    shown = [difference for output in results.outputs for difference in output.differences[:3]]
    return Table("Greedy outputs", columns, rows, "; ".join(shown))


def parts_table(results: Results) -> Table:
    columns = [
        Column("part"),
        Column("arm"),
        Column("answered"),
        Column("prompt", "tokens"),
        Column("hit", "tokens"),
        Column("TTFT p50", "ms", 0),
        Column("throughput", "tokens/s", 1),
    ]
    rows: list[list[Cell]] = [
        [
            part.part,
            arm.name,
            f"{part.ok} of {part.requests}",
            part.prompt_tokens,
            part.hit_tokens,
            part.ttft_p50_ms,
            part.tokens_per_s,
        ]
        for index in range(len(results.arms[0].parts))
        for arm in results.arms
        for part in [arm.parts[index]]
    ]
    skipped = {part: count for part, count in results.skipped_too_long.items() if count}
    note = "Throughput: prompt and output tokens / time with a request of the part in flight."
    if skipped:
        note += (
            " Left out, longer than the context: " + ", ".join(f"{n} of {part}" for part, n in skipped.items()) + "."
        )
    return Table("Parts of the workload", columns, rows, note)


def self_check_table(results: Results) -> Table:
    columns = [
        Column("arm"),
        Column("send lag p50", "ms"),
        Column("send lag p99", "ms"),
        Column("loop lag p99", "ms"),
        Column("requested", "requests/s"),
        Column("achieved", "requests/s"),
        Column("client CPU", "% of a core", 1),
    ]
    rows: list[list[Cell]] = [
        [
            arm.name,
            check.send_lag_p50_ms,
            check.send_lag_p99_ms,
            check.loop_lag_p99_ms,
            check.requested_rate,
            check.achieved_rate,
            check.client_cpu * 100,
        ]
        for arm in results.arms
        if (check := arm.self_check) is not None
    ]
    return Table("Client", columns, rows)


def phases_table(results: Results) -> Table:
    columns = [Column("arm"), Column("phase"), Column("time", "s", 1), Column("seen")]
    rows: list[list[Cell]] = [
        [arm.name, phase.name, phase.seconds, phase.detail] for arm in results.arms for phase in arm.phases
    ]
    return Table("Phases of each arm", columns, rows)


def _figures(results: Results, records: Sequence[RequestRecord]) -> list[Table | Figure]:
    by_arm = {arm.name: [record for record in records if record.arm == arm.name and record.ok] for arm in results.arms}
    figures: list[Table | Figure] = [plots.ttft_distribution(by_arm), plots.ttft_against_hits(by_arm)]
    figures.append(plots.hit_rate_over_time(by_arm))
    figures.append(
        plots.hits_per_tier({arm.name: arm.hit_tokens_by_tier for arm in results.arms}, _tiers(results.arms))
    )
    return figures


def _arms_text(results: Results) -> str:
    return "\n\n".join(f"{arm.name}: {arm.about}" for arm in results.arms if arm.about)


def _metadata(results: Results) -> dict[str, str]:
    return {
        "command": results.command,
        "started": results.started,
        "took": format_seconds(results.seconds),
        "model": results.model,
        **results.hardware,
        **results.lmc,
        "data": str(results.workload.get("licence", "")),
        "seed": str(results.workload.get("seed")),
        **{f"arm {arm.name}": arm.command for arm in results.arms},
    }


def _tiers(arms: Sequence[ArmResult]) -> list[str]:
    found = dict.fromkeys(tier for arm in arms for tier in arm.hit_tokens_by_tier)
    known = [tier for tier in ("device", "host", "disk", "redis", "s3") if tier in found]
    return known + [tier for tier in found if tier not in known]


def _percent(part: int | None, whole: int) -> float | None:
    return None if part is None or not whole else 100 * part / whole
