"""lmc sim: predict hits and choose settings from a trace, without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.choices import BOUND, POLICIES, ROUTINGS, WINDOWS, listed, metavar
from lmc.cli.default_command import DefaultCommandGroup
from lmc.cli.trace_source import TraceSource, reads_trace
from lmc.units import parse_seconds, parse_size

if TYPE_CHECKING:
    from lmc.report import Table
    from lmc.sim.cost import CostModel

EXAMPLE = "--example"


class ExampleGroup(DefaultCommandGroup):
    """`lmc sim --example` replays the shipped trace, with the options of `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # Any: as in the class above
        if args and args[0] == EXAMPLE:
            from lmc.shipped import shipped

            args = ["run", str(shipped("workloads") / "example-trace.jsonl"), "--no-cache", *args[1:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ExampleGroup,
    help="Predict hits and choose settings from a trace, without an engine. `lmc sim TRACE` runs the command `run`, and "
    "`lmc sim --example` runs it on a shipped trace.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Csv = Annotated[Path | None, typer.Option(help="Write the rows to this CSV file.")]
Window = Annotated[
    str,
    typer.Option(
        metavar=metavar(WINDOWS),
        help="Requests that are measured. With last-half, the first half only warms the cache.",
    ),
]
TokenBytes = Annotated[str, typer.Option(help="KV bytes per token, such as 192KiB, if the trace does not state them.")]
CapacityBlocks = Annotated[
    str | None,
    typer.Option(
        help="Capacities in trace blocks, separated by commas: a number, a share of the unique blocks such as 1%, or inf."
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        help="Stored bytes / raw bytes of a chunk on a compressed disk, such as 0.71; lmc probe codec measures it."
    ),
]
CodecSpeed = Annotated[
    str | None, typer.Option(help="Raw bytes per second that one thread encodes or decodes, such as 4GB/s.")
]
CostFile = Annotated[Path | None, typer.Option(help="YAML cost model. It adds times and costs to the result.")]


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="sim")


@app.command()
@reads_trace
def run(
    source: TraceSource,
    policy: Annotated[
        str,
        typer.Option(
            help=f"Eviction policies, separated by commas: {listed((*POLICIES, BOUND))}. belady knows the future and is the upper bound. "
            "FILE.py:SPEC takes a policy of your own."
        ),
    ] = "lru",
    capacity_blocks: CapacityBlocks = None,
    capacity_tokens: Annotated[
        str | None, typer.Option(help="Capacities in tokens, separated by commas, such as 3M,10M.")
    ] = None,
    capacity_bytes: Annotated[
        str | None, typer.Option(help="Capacities in bytes, separated by commas, such as 64GiB,1TiB.")
    ] = None,
    token_bytes: TokenBytes = "0",
    chunk_tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens per chunk, separated by commas, each a multiple of the trace block. Then only full chunks are cached."
        ),
    ] = None,
    window: Window = "all",
    shards: Annotated[
        float | None, typer.Option(help="Estimate LRU hits from this share of the trace blocks, such as 0.01.")
    ] = None,
    admit_touches: Annotated[int, typer.Option(min=1, help="Store a trace block at its n-th touch.")] = 1,
    low_watermark: Annotated[float, typer.Option(help="Evict a full cache down to this share of its capacity.")] = 1.0,
    write_delay: Annotated[str, typer.Option(help="Delay before a stored trace block can be hit.")] = "0s",
    ttl: Annotated[
        str | None, typer.Option(help="Drop a trace block that was not touched for this time, such as 5m.")
    ] = None,
    fixed_ttl: Annotated[
        bool, typer.Option("--fixed-ttl", help="Count the TTL from the store, not from the last touch.")
    ] = False,
    cost: CostFile = None,
    json: Json = False,
    csv: Csv = None,
    png: Annotated[Path | None, typer.Option(help="Draw the miss ratio over the capacity into this PNG file.")] = None,
) -> None:
    """Count hits by policy, capacity and chunk size."""
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
    """Describe a trace: lengths, arrivals, reuse and possible hits. The possible hits are those of an unlimited cache."""
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
    ttls: Annotated[
        str, typer.Option("--ttl", help="Times to live since the last touch, separated by commas.")
    ] = "1m,5m,15m,1h,inf",
    capacity_blocks: CapacityBlocks = "1%,3%,10%,30%,inf",
    window: Window = "all",
    json: Json = False,
    csv: Csv = None,
) -> None:
    """Count LRU hits by time to live and capacity."""
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
    host: Annotated[
        str,
        typer.Option(
            help="Host sizes, separated by commas: 64GiB, a share of the unique trace blocks (5%), or a number of them."
        ),
    ] = "1%,3%,10%",
    disk: Annotated[
        str, typer.Option(help="Disk sizes, written like the host sizes. 0 means no disk tier.")
    ] = "0,10%,30%,inf",
    remote: Annotated[
        str, typer.Option(help="Sizes of a remote tier, written like the host sizes. 0 means no remote tier.")
    ] = "0",
    exclusive: Annotated[
        bool,
        typer.Option("--exclusive", help="Keep a trace block in one tier only. Otherwise lower tiers see every touch."),
    ] = False,
    cost: CostFile = None,
    token_bytes: TokenBytes = "0",
    window: Window = "all",
    json: Json = False,
    csv: Csv = None,
) -> None:
    """Count hits by tier for every combination of tier sizes. With --cost, also estimate times to first token and costs."""
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
    """Count hits by tenant, type or model, and find the best quotas. All of them share one LRU cache."""
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
    config: Annotated[Path, typer.Option(help="YAML file of cache settings, as for lmc serve.")],
    instances: Annotated[int, typer.Option(min=1, help="Number of engine instances, each with its own cache.")] = 1,
    routing: Annotated[
        str,
        typer.Option(
            metavar=metavar(ROUTINGS),
            help="How requests are assigned to instances. prefix chooses the instance that served the longest prefix.",
        ),
    ] = "round-robin",
    shared: Annotated[
        str,
        typer.Option(
            help="Size of the tier that all instances share, such as 2TiB: redis and s3 of the settings, otherwise a remote tier. "
            "By default redis and s3 never evict, and there is no other."
        ),
    ] = "0",
    cost: CostFile = None,
    token_bytes: TokenBytes = "0",
    compress_ratio: Ratio = None,
    codec_speed: CodecSpeed = None,
    window: Window = "all",
    json: Json = False,
    csv: Csv = None,
) -> None:
    """Replay a trace under the settings of the live cache. Runs the live cache's own directory on a virtual clock."""
    from lmc.cache.settings import load_settings
    from lmc.sim import replay_show
    from lmc.sim.shown import parse_window

    size = parse_size(token_bytes)
    settings = load_settings(config).config
    result = replay_show.replay_settings(
        source.load(), settings, instances, routing, shared, read_cost(cost), size, compress_ratio, codec_speed
    )
    shown = replay_show.show_replay(result, parse_window(window), timed=cost is not None)
    output(shown.table, shown.json, shown.table, shown.notes, json, csv)


@app.command()
@reads_trace
def tune(
    source: TraceSource,
    memory: Annotated[str, typer.Option(help="Limit of host memory over all ranks, such as 64GiB.")],
    disk: Annotated[str, typer.Option(help="Limit of disk space, such as 1TiB. 0 means no disk tier.")] = "0",
    disk_path: Annotated[Path, typer.Option(help="Folder of the disk tier in the settings that are written.")] = Path(
        "lmc-disk"
    ),
    dollars_per_hour: Annotated[
        float | None, typer.Option(help="Limit of the tiers' cost per hour, at the prices in --cost.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help=f"Eviction policies to try, separated by commas, by default all: {listed(POLICIES)}."),
    ] = None,
    token_bytes: TokenBytes = "0",
    compress_ratio: Ratio = None,
    codec_speed: CodecSpeed = None,
    cost: CostFile = None,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the chosen settings to this file, for lmc serve --config."),
    ] = None,
    json: Json = False,
    csv: Csv = None,
) -> None:
    """Choose chunk size, policy, tier sizes and TTL within a budget. The first half of the trace is used to choose, the second to judge."""
    from lmc.sim import tune as tuning
    from lmc.sim import tune_show
    from lmc.sim.compression import NO_CODEC, make_codec
    from lmc.sim.cost import known_token_bytes
    from lmc.sim.policies import check_policies

    model, size = read_cost(cost), parse_size(token_bytes)
    trace = source.load()
    names = split_list(policy)
    check_policies(names)
    budget = tuning.make_budget(memory, disk, dollars_per_hour, model)
    codec = NO_CODEC if compress_ratio is None and codec_speed is None else make_codec(compress_ratio, codec_speed)
    tuned = tuning.tune(trace, known_token_bytes(trace, size, model), budget, names, model, codec)
    if out is not None:
        tune_show.write_settings(tuned, out, disk_path)
    table = tune_show.front_table(tuned)
    output(table, tune_show.tune_json(tuned, disk_path), table, tuned.notes, json, csv)
    if out is not None and not json:
        typer.echo(f"settings: {out}; run: lmc serve MODEL --config {out}")


@app.command()
@reads_trace
def size(
    source: TraceSource,
    target: Annotated[
        str,
        typer.Option(help="Hit rates to reach, in shares of the input tokens, separated by commas, such as 40%,60%."),
    ],
    memory: Annotated[
        str | None,
        typer.Option(
            help="Host memory above a disk or a remote tier, such as 64GiB. By default it is what half of the hits need."
        ),
    ] = None,
    cost: CostFile = None,
    token_bytes: TokenBytes = "0",
    json: Json = False,
    csv: Csv = None,
) -> None:
    """Find the sizes of tiers for a hit rate. With --cost, also estimate times to first token and costs."""
    from lmc.sim import size_show

    model, known = read_cost(cost), parse_size(token_bytes)
    shown = size_show.size_targets(source.load(), split_list(target), model, known, memory)
    output(shown.table, shown.json, shown.table, shown.notes, json, csv)


@app.command()
@reads_trace
def report(
    source: TraceSource,
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Write report.html, pictures and CSV files to this folder.")
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"Eviction policies to replay, separated by commas, by default all: {listed((*POLICIES, BOUND))}."
        ),
    ] = None,
    sizes: Annotated[int, typer.Option(min=2, help="Number of capacities to replay for each policy.")] = 20,
    cost: CostFile = None,
    token_bytes: TokenBytes = "0",
    origin: Annotated[str, typer.Option(help="Origin and licence of the trace, for the report.")] = "",
    json: Json = False,
) -> None:
    """Write an HTML page about a trace. It shows the miss ratio, policies, chunk sizes, TTL, tiers and times."""
    from lmc.report import to_json
    from lmc.sim.policies import check_policies
    from lmc.sim.study import make_study
    from lmc.sim.study_page import report_json, write_report

    names = split_list(policy)
    check_policies(names)
    trace = source.load()
    command = f"lmc sim report {source.trace.name} --sizes {sizes}" + (f" --cost {cost.name}" if cost else "")
    study = make_study(trace, names, sizes, read_cost(cost), parse_size(token_bytes), modes=True)
    page = write_report(study, out, command, origin)
    typer.echo(to_json(report_json(study, page)).decode() if json else f"report: {page}", nl=not json)


@app.command("check-policy")
def check_policy(
    policy: Annotated[str, typer.Argument(help="FILE.py:SPEC, or the name of a policy.")],
    rounds: Annotated[int, typer.Option(min=1, help="Random runs of requests for each check.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random requests.")] = 0,
    json: Json = False,
) -> None:
    """Check that an eviction policy keeps its contract. Exits with 1 if it does not."""
    from lmc import report
    from lmc.cache.policy import get_policy
    from lmc.sim import policy_check

    spec = get_policy(policy)
    found = policy_check.check_policy(spec, rounds, seed)
    if json:
        checks = [{"what": one.what, "holds": one.ok, "fault": one.fault} for one in found]
        typer.echo(
            report.to_json({"policy": spec.name, "rounds": rounds, "seed": seed, "checks": checks}).decode(), nl=False
        )
    else:
        report.print_table(policy_check.check_table(spec, found, rounds))
    if not all(one.ok for one in found):
        raise typer.Exit(1)


def output(
    table: Table,
    as_json: Mapping[str, Any],  # Any: JSON
    rows: Table,
    notes: tuple[str, ...],
    json: bool,
    csv: Path | None,
) -> None:
    """Print the table and its notes, or one JSON object. Write the rows as CSV if csv names a file."""
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
