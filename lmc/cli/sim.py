"""lmc sim: predict hits and choose settings from a trace, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmc.cli import sim_settings, sim_sweep
from lmc.cli.choices import BOUND, POLICIES, listed
from lmc.cli.default_command import DefaultCommandGroup
from lmc.cli.sim_options import (
    CapacityBlocks,
    CapacityBytes,
    CapacityTokens,
    ChunkTokens,
    CostFile,
    Csv,
    Json,
    TokenBytes,
    Window,
    capacity_options,
    output,
    parse_counts,
    read_cost,
    split_list,
)
from lmc.cli.trace_source import TraceSource, reads_trace
from lmc.units import parse_seconds, parse_size

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


def add_to(parent: typer.Typer) -> None:
    app.add_typer(sim_sweep.commands)
    app.add_typer(sim_settings.commands)
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
    capacity_tokens: CapacityTokens = None,
    capacity_bytes: CapacityBytes = None,
    token_bytes: TokenBytes = "0",
    chunk_tokens: ChunkTokens = None,
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
    from lmc.sim import sweep_show
    from lmc.sim.policy_replay import ReplayOptions
    from lmc.sim.shown import parse_window
    from lmc.sim.sweep import run_sweep, sample_sweep

    capacities = capacity_options(capacity_blocks, capacity_tokens, capacity_bytes, token_bytes)
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
