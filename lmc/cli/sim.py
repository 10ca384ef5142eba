"""lmc sim: replay a trace without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.default_command import DefaultCommandGroup
from lmc.cli.trace_source import TraceSource, reads_trace
from lmc.units import parse_seconds, parse_size

if TYPE_CHECKING:
    from lmc.report import Table
    from lmc.sim.cost import CostModel

app = typer.Typer(
    cls=DefaultCommandGroup,
    help="Replay a trace through the cache's own logic: hits, capacities, policies. `lmc sim TRACE` runs the verb `run`.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Csv = Annotated[Path | None, typer.Option(help="Write the rows to this CSV file.")]
Window = Annotated[str, typer.Option(help="all, or last-half: the first half only warms the cache up.")]
TokenBytes = Annotated[str, typer.Option(help="KV bytes of a token, where the trace does not say it: 192KiB.")]
CapacityBlocks = Annotated[
    str | None, typer.Option(help="Capacities in blocks, comma separated: 1000, 1% of the unique blocks, inf.")
]
CostFile = Annotated[Path | None, typer.Option(help="YAML cost model, for times and money.")]


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="sim")


@app.command()
@reads_trace
def run(
    source: TraceSource,
    policy: Annotated[str, typer.Option(help="Eviction policies, comma separated; belady is the bound.")] = "lru",
    capacity_blocks: CapacityBlocks = None,
    capacity_tokens: Annotated[str | None, typer.Option(help="Capacities in tokens: 3M,10M.")] = None,
    capacity_bytes: Annotated[str | None, typer.Option(help="Capacities in bytes: 64GiB,1TiB.")] = None,
    token_bytes: TokenBytes = "0",
    chunk_tokens: Annotated[
        str | None, typer.Option(help="Chunk sizes, multiples of the trace's block; only full chunks are cached.")
    ] = None,
    window: Window = "all",
    shards: Annotated[float | None, typer.Option(help="Estimate LRU from this share of the blocks.")] = None,
    admit_touches: Annotated[int, typer.Option(min=1, help="Store a block when it is asked for the n-th time.")] = 1,
    low_watermark: Annotated[float, typer.Option(help="A full cache evicts down to this share.")] = 1.0,
    write_delay: Annotated[str, typer.Option(help="A stored block is readable only so much later.")] = "0s",
    ttl: Annotated[str | None, typer.Option(help="Drop a block that was not touched for so long.")] = None,
    fixed_ttl: Annotated[bool, typer.Option("--fixed-ttl", help="The TTL counts from the store.")] = False,
    cost: CostFile = None,
    json: Json = False,
    csv: Csv = None,
    png: Annotated[Path | None, typer.Option(help="Write the miss-ratio curve to this picture.")] = None,
) -> None:
    """Hits of policies at capacities and chunk sizes."""
    from lmc import report
    from lmc.sim import capacity, sweep_show
    from lmc.sim.policy_replay import ReplayOptions
    from lmc.sim.shown import parse_window
    from lmc.sim.sweep import run_sweep, sample_sweep

    capacities = capacity.CapacityOptions(
        split_list(capacity_blocks), split_list(capacity_tokens), split_list(capacity_bytes), parse_size(token_bytes)
    )
    if not capacities.blocks + capacities.tokens + capacities.sizes:
        capacities = capacity.DEFAULT
    trace, measured, chunks = source.load(), parse_window(window), parse_counts(chunk_tokens)
    if shards is not None:
        sweep = sample_sweep(trace, split_list(policy), capacities, measured, chunks, shards)
    else:
        options = ReplayOptions(
            admit_touches,
            low_watermark,
            parse_seconds(write_delay),
            float("inf") if ttl is None else parse_seconds(ttl),
            not fixed_ttl,
        )
        sweep = run_sweep(trace, split_list(policy), capacities, measured, chunks, options, read_cost(cost))
    if png is not None:
        report.write_file(png, sweep_show.miss_ratio_figure(sweep).png)
    output(
        sweep_show.sweep_table(sweep),
        sweep_show.sweep_json(sweep),
        sweep_show.sweep_rows(sweep),
        sweep.notes,
        json,
        csv,
    )


@app.command()
@reads_trace
def describe(source: TraceSource, json: Json = False, csv: Csv = None) -> None:
    """Counts, lengths, arrivals, reuse, sharing, and the hits of an unlimited cache."""
    from lmc.sim import describe as facts

    trace = source.load()
    sections = facts.describe(trace)
    table = facts.facts_table(f"{trace.source} ({trace.format})", sections)
    head = {"source": trace.source, "format": trace.format, "notes": trace.notes}
    output(table, {**head, **facts.facts_json(sections)}, table, trace.notes, json, csv)


@app.command()
@reads_trace
def ttl(
    source: TraceSource,
    ttls: Annotated[str, typer.Option("--ttl", help="Times to live since the last touch.")] = "1m,5m,15m,1h,inf",
    capacity_blocks: CapacityBlocks = "1%,3%,10%,30%,inf",
    window: Window = "all",
    json: Json = False,
    csv: Csv = None,
) -> None:
    """LRU hits by sliding time to live and capacity."""
    from lmc.sim import capacity, grid_show
    from lmc.sim.shown import parse_window

    trace = source.load()
    sizes = capacity.resolve(capacity.CapacityOptions(split_list(capacity_blocks)), trace)
    plane = grid_show.ttl_plane(trace, split_list(ttls), sizes, parse_window(window))
    output(plane.table, plane.json, plane.table, plane.notes, json, csv)


@app.command()
@reads_trace
def tiers(
    source: TraceSource,
    host: Annotated[str, typer.Option(help="Host sizes: 64GiB, 5% of the unique blocks, 1000 blocks.")] = "1%,3%,10%",
    disk: Annotated[str, typer.Option(help="Disk sizes; 0 for none.")] = "0,10%,30%,inf",
    remote: Annotated[str, typer.Option(help="Sizes of a remote tier; 0 for none.")] = "0",
    exclusive: Annotated[
        bool, typer.Option("--exclusive", help="A block is in one tier only; default: lower tiers see every touch.")
    ] = False,
    cost: CostFile = None,
    token_bytes: TokenBytes = "0",
    window: Window = "all",
    json: Json = False,
    csv: Csv = None,
) -> None:
    """Hits by tier for every combination of sizes; with --cost also time to first token and money."""
    from lmc.sim import grid_show
    from lmc.sim.shown import parse_window

    size = parse_size(token_bytes)
    trace = source.load()
    sizes = {"host": split_list(host), "disk": split_list(disk), "remote": split_list(remote)}
    if sizes["remote"] == ("0",):
        del sizes["remote"]
    grid = grid_show.tiers(trace, sizes, parse_window(window), read_cost(cost), exclusive, size)
    output(grid.table, grid.json, grid.table, grid.notes, json, csv)


@app.command()
@reads_trace
def groups(
    source: TraceSource,
    capacity_blocks: CapacityBlocks = "10%",
    window: Window = "all",
    json: Json = False,
    csv: Csv = None,
) -> None:
    """Hits by tenant (or type, or model) in a shared cache, and the best split into quotas."""
    from lmc.sim import capacity, grid_show
    from lmc.sim.shown import parse_window

    trace = source.load()
    sizes = capacity.resolve(capacity.CapacityOptions(split_list(capacity_blocks)), trace)
    rows = grid_show.groups(trace, sizes, parse_window(window))
    output(rows.table, rows.json, rows.table, rows.notes, json, csv)


@app.command()
@reads_trace
def replay(
    source: TraceSource,
    config: Annotated[Path, typer.Option(help="Settings file, the one that lmc serve --config takes.")],
    instances: Annotated[int, typer.Option(min=1, help="Engine instances, each with its own cache.")] = 1,
    routing: Annotated[
        str, typer.Option(help="round-robin, or prefix: where the longest prefix was served.")
    ] = "round-robin",
    shared: Annotated[str, typer.Option(help="Capacity of a remote tier that all instances share; 0: none.")] = "0",
    cost: CostFile = None,
    token_bytes: TokenBytes = "0",
    window: Window = "all",
    json: Json = False,
    csv: Csv = None,
) -> None:
    """Replay through the live cache's own directory: all tiers, write modes, TTL, instances, on a virtual clock."""
    from lmc.sim import replay_show
    from lmc.sim.shown import parse_window

    size = parse_size(token_bytes)
    result = replay_show.replay_settings(source.load(), config, instances, routing, shared, read_cost(cost), size)
    shown = replay_show.show_replay(result, parse_window(window), timed=cost is not None)
    output(shown.table, shown.json, shown.table, shown.notes, json, csv)


@app.command()
@reads_trace
def tune(
    source: TraceSource,
    memory: Annotated[str, typer.Option(help="Most host memory over all ranks: 64GiB.")],
    disk: Annotated[str, typer.Option(help="Most disk: 1TiB; 0 for none.")] = "0",
    disk_path: Annotated[Path, typer.Option(help="Folder that the settings name for the disk tier.")] = Path(
        "lmc-disk"
    ),
    dollars_per_hour: Annotated[
        float | None, typer.Option(help="Most rent for the tiers, by the prices in --cost.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Policies to try; default: all.")] = None,
    token_bytes: TokenBytes = "0",
    cost: CostFile = None,
    out: Annotated[Path | None, typer.Option("--output", "-o", help="Write settings for lmc serve --config.")] = None,
    json: Json = False,
    csv: Csv = None,
) -> None:
    """Search chunk size, policy, tier sizes and TTL within a budget; the first half of the trace tunes, the second judges."""
    from lmc.sim import tune as tuning
    from lmc.sim import tune_show
    from lmc.sim.policies import check_policies

    model, size = read_cost(cost), parse_size(token_bytes)
    trace = source.load()
    names = split_list(policy)
    check_policies(names)
    budget = tuning.make_budget(memory, disk, dollars_per_hour, model)
    tuned = tuning.tune(trace, tuning.known_token_bytes(trace, size, model), budget, names, model)
    if out is not None:
        tune_show.write_settings(tuned, out, disk_path)
    table = tune_show.front_table(tuned)
    output(table, tune_show.tune_json(tuned, disk_path), table, tuned.notes, json, csv)
    if out is not None and not json:
        typer.echo(f"settings: {out}; run: lmc serve MODEL --config {out}")


@app.command()
@reads_trace
def report(
    source: TraceSource,
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.html, pictures and CSV.")],
    policy: Annotated[str | None, typer.Option(help="Policies to replay; default: all.")] = None,
    sizes: Annotated[int, typer.Option(min=2, help="Number of capacities per policy.")] = 20,
    cost: CostFile = None,
    origin: Annotated[str, typer.Option(help="Origin and licence of the trace, shown in the report.")] = "",
    json: Json = False,
) -> None:
    """Everything about a trace on one page: curves, policies, chunk sizes, TTL, tiers, times."""
    from lmc.report import to_json
    from lmc.sim.policies import check_policies
    from lmc.sim.study import make_study
    from lmc.sim.study_page import report_json, write_report

    names = split_list(policy)
    check_policies(names)
    trace = source.load()
    command = f"lmc sim report {source.trace.name} --sizes {sizes}" + (f" --cost {cost.name}" if cost else "")
    study = make_study(trace, names, sizes, read_cost(cost))
    page = write_report(study, out, command, origin)
    typer.echo(to_json(report_json(study, page)).decode() if json else f"report: {page}", nl=not json)


def output(
    table: Table,
    as_json: Mapping[str, Any],  # Any: JSON
    rows: Table,
    notes: tuple[str, ...],
    json: bool,
    csv: Path | None,
) -> None:
    """The table and notes on the screen, or one JSON object; and the rows as CSV where asked for."""
    from lmc import report

    if csv is not None:
        report.write_file(csv, report.table_csv(rows))
    if json:
        typer.echo(report.to_json(as_json).decode(), nl=False)
        return
    report.print_table(table)
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def read_cost(path: Path | None) -> CostModel | None:
    from lmc.sim.cost_file import read_cost_model

    return None if path is None else read_cost_model(path)


def split_list(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def parse_counts(text: str | None) -> list[int]:
    from lmc.units import parse_count

    return [parse_count(part) for part in split_list(text)]
