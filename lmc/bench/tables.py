"""Builds the tables of a bench report from its results, one function per table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lmc.bench.records import ArmResult, Comparison, OutputCheck, RequestRecord, Results
from lmc.bench.workload import PackageSource, load_workload, shipped_workloads
from lmc.report import Cell, Column, Table

PARTS = ("queue", "lookup", "load", "rest")  # of TtftParts


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
    return Table(
        "Figures per arm", columns, rows, "The hit rate is hit tokens / prompt tokens of the answered requests."
    )


def brief_table(results: Results) -> Table:
    """The most important figures of the arms, for the width of a terminal."""
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
    return Table(results.name, columns, rows, f"The ratio is to {results.arms[0].name}.")


def hits_table(results: Results) -> Table:
    tiers = tier_names(results.arms)
    columns = [Column("arm"), *(Column(tier, "tokens") for tier in tiers), Column("all", "tokens")]
    rows: list[list[Cell]] = []
    for arm in results.arms:
        rows.append([arm.name, *(arm.hit_tokens_by_tier.get(tier) for tier in tiers), arm.hit_tokens])
        if (told := arm.expected_hit_tokens_by_tier) is not None:
            expected = [told.get(tier, 0 if tier in arm.hit_tokens_by_tier else None) for tier in tiers]
            rows.append([f"{arm.name}, expected", *expected, arm.expected_hit_tokens])
    note = (
        "The engine counts the device tier and lmc the others; `all` is the sum that the responses report. The simulator predicts the "
        "tiers if one request runs at a time and every tier has room for the load."
    )
    return Table("Hit tokens by tier", columns, rows, note)


def bars_table(results: Results) -> Table:
    columns = [Column("bar"), Column("ratio", "", 2), Column("low", "", 2), Column("high", "", 2), Column("requests")]
    columns.append(Column("verdict"))
    verdicts = {True: "met", False: "NOT met", None: "undecided"}
    rows: list[list[Cell]] = [
        [bar.text, bar.ratio, bar.low, bar.high, bar.samples, verdicts[bar.met] if bar.samples else "no such request"]
        for bar in results.bars
    ]
    note = "A bar is met or not met if its whole 95 % interval (low to high) is; else, and with fewer than 6 sessions, it is undecided."
    return Table("Bars of this workload", columns, rows, note)


def comparisons_table(comparisons: Sequence[Comparison], title: str = "Paired comparison with the first arm") -> Table:
    columns = [
        Column("a"),
        Column("b"),
        Column("metric"),
        Column("over"),
        Column("a / b", "", 3),
        Column("low", "", 3),
        Column("high", "", 3),
        Column("a is"),
        Column("requests"),
    ]
    rows: list[list[Cell]] = [
        [c.a, c.b, c.metric, c.over, c.ratio, c.low, c.high, c.verdict, c.samples] for c in comparisons
    ]
    return Table(title, columns, rows)


def prediction_table(results: Results) -> Table:
    columns = [
        Column("arm"),
        Column("hits expected", "tokens"),
        Column("hits measured", "tokens"),
        Column("TTFT p50 predicted", "ms", 0),
        Column("TTFT p50 measured", "ms", 0),
        Column("measured / predicted", "", 2),
        Column("load rate", "GB/s", 2),
        Column("break even", "tokens"),
    ]
    rows: list[list[Cell]] = [
        [
            p.arm,
            p.expected_hit_tokens,
            p.measured_hit_tokens,
            p.predicted_ttft_p50_ms,
            p.measured_ttft_p50_ms,
            p.measured_ttft_p50_ms / p.predicted_ttft_p50_ms
            if p.measured_ttft_p50_ms and p.predicted_ttft_p50_ms
            else None,
            None if p.load_bytes_per_s is None else p.load_bytes_per_s / 1e9,
            p.break_even_tokens,
        ]
        for p in results.predictions
    ]
    return Table("Predicted and measured", columns, rows)


def attribution_table(results: Results, records: Sequence[RequestRecord]) -> Table:
    columns = [
        Column("arm"),
        Column("requests"),
        Column("TTFT", "ms", 1),
        Column("queue", "ms", 1),
        Column("lookup", "ms", 1),
        Column("load", "ms", 1),
        Column("rest", "ms", 1),
        Column("loaded", "MB", 1),
        Column("load rate", "GB/s", 2),
        Column("staging", "ms", 1),
    ]
    rows: list[list[Cell]] = []
    for name, mine in attributed(results, records):
        parts = [r.parts for r in mine]
        size, load, stage = (
            _mean([getattr(r, field) for r in mine]) for field in ("load_bytes", "load_ms", "stage_ms")
        )
        rows.append(
            [
                name,
                len(mine),
                _mean([r.service_ttft_ms for r in mine]),
                *(_mean([getattr(p, f"ttft_{part}_ms") for p in parts]) for part in PARTS),
                None if size is None else size / 1e6,
                size / load / 1e6 if size and load else None,
                stage,
            ]
        )
    return Table("Time to first token, in parts (means)", columns, rows)


def attributed(results: Results, records: Sequence[RequestRecord]) -> list[tuple[str, list[RequestRecord]]]:
    """The answered requests whose TTFT parts are known, by arm and by whether they hit."""
    found = []
    for arm in results.arms:
        for kind, wanted in (("hits", True), ("misses", False)):
            mine = [
                r
                for r in records
                if r.arm == arm.name and r.ok and r.parts.ttft_rest_ms is not None and bool(r.cached_tokens) == wanted
            ]
            if mine:
                found.append((f"{arm.name}: {kind}", mine))
    return found


def misses_table(results: Results, records: Sequence[RequestRecord]) -> Table:
    """The reasons that lmc gave for the end of each request's hit, counted."""
    rows: list[list[Cell]] = []
    for arm in results.arms:
        asked = [r for r in records if r.arm == arm.name and r.asked_ms is not None]
        for why, count in Counter(r.miss or "every full chunk hit" for r in asked).most_common():
            mine = [r for r in asked if (r.miss or "every full chunk hit") == why]
            tokens = sum(r.prompt_tokens - sum((r.cached_by_tier or {}).values()) for r in mine)
            rows.append([arm.name, why, count, tokens])
    columns = [Column("arm"), Column("why"), Column("requests"), Column("left to compute", "tokens")]
    return Table("Why hits ended where they did", columns, rows, "docs/operations.md explains the reasons.")


def outputs_table(outputs: Sequence[OutputCheck]) -> Table:
    columns = [
        Column("arm"),
        Column("against"),
        Column("requests"),
        Column("tokens compared"),
        Column("ties"),
        Column("differences"),
    ]
    rows: list[list[Cell]] = [
        [o.arm, o.reference, o.compared_requests, o.compared_tokens, o.ties, len(o.differences)] for o in outputs
    ]
    shown = [difference for output in outputs for difference in output.differences[:3]]
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
    note = "The throughput is prompt and output tokens / time during which a request of the part ran."
    if skipped:
        note += (
            " Requests were left out because they are longer than the context: "
            + ", ".join(f"{n} of {part}" for part, n in skipped.items())
            + "."
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
        Column("client processes"),
        Column("requests of the start"),
        Column("their TTFT p50", "ms", 0),
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
            check.processes,
            arm.start_requests or None,
            arm.start_ttft_p50_ms,
        ]
        for arm in results.arms
        if (check := arm.self_check) is not None
    ]
    started = any(arm.start_requests for arm in results.arms)
    note = (
        "The start, the first request of each connection, is left out of the send lag and of the arm's TTFT."
        if started
        else ""
    )
    if not started:
        columns, rows = columns[:-2], [row[:-2] for row in rows]
    return Table("Client", columns, rows, note)


def phases_table(results: Results) -> Table:
    columns = [Column("arm"), Column("phase"), Column("time", "s", 1), Column("seen")]
    rows: list[list[Cell]] = [
        [arm.name, phase.name, phase.seconds, phase.detail] for arm in results.arms for phase in arm.phases
    ]
    return Table("Phases of each arm", columns, rows)


def shipped_table() -> Table:
    columns = [Column("workload"), Column("needs"), Column("what it measures")]
    rows: list[list[Cell]] = []
    for name, file in shipped_workloads().items():
        workload = load_workload(file)
        needs = "a data file (lmc data list)" if "$LMC_DATA_DIR" in file.read_text() else None
        packages = {part.source.package for part in workload.parts.values() if isinstance(part.source, PackageSource)}
        rows.append(
            [
                name,
                needs or ", ".join(f"package {package}" for package in sorted(packages)),
                workload.about.split(". ")[0],
            ]
        )
    return Table("Shipped workloads", columns, rows, "The licence line of each file says where its data come from.")


def tier_names(arms: Sequence[ArmResult]) -> list[str]:
    found = dict.fromkeys(tier for arm in arms for tier in arm.hit_tokens_by_tier)
    known = [tier for tier in ("device", "host", "disk", "redis", "s3", "mooncake", "external") if tier in found]
    return known + [tier for tier in found if tier not in known]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(part: int | None, whole: int) -> float | None:
    return None if part is None or not whole else 100 * part / whole
