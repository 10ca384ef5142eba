"""The commands of lmc sim about settings of the live cache: tiers, replay, tune, size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmc.cli.choices import POLICIES, ROUTINGS, listed, metavar
from lmc.cli.sim_options import (
    CodecSpeed,
    CostFile,
    Csv,
    Json,
    Ratio,
    TokenBytes,
    Window,
    output,
    read_cost,
    split_list,
)
from lmc.cli.trace_source import TraceSource, reads_trace
from lmc.units import parse_size

if TYPE_CHECKING:
    from lmc.sim.full_replay import ReplayResult

commands = typer.Typer()


@commands.command()
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


@commands.command()
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
            help="Size of the tier that all instances share, such as 2TiB: redis, s3 and mooncake of the settings, else a remote tier. "
            "By default they never evict, and there is no other."
        ),
    ] = "0",
    shared_host: Annotated[
        bool,
        typer.Option(
            "--shared-host",
            help="The instances share one host memory and one disk, as with lmc node, as large as theirs together. The result has both: "
            "with the node, and each with its own.",
        ),
    ] = False,
    cost: CostFile = None,
    token_bytes: TokenBytes = "0",
    compress_ratio: Ratio = None,
    codec_speed: CodecSpeed = None,
    shape: Annotated[
        Path | None,
        typer.Option(
            help="File with the KV groups of a model that mixes windows with full attention; lmc probe model writes it. "
            "By default what the record says."
        ),
    ] = None,
    window: Window = "all",
    json: Json = False,
    csv: Csv = None,
) -> None:
    """Replay a trace under the settings of the live cache. Runs the live cache's own directory on a virtual clock."""
    from lmc.cache.settings import load_settings
    from lmc.sim import replay_show
    from lmc.sim.shown import parse_window

    size = parse_size(token_bytes)
    settings, trace, model = load_settings(config).config, source.load(), read_cost(cost)

    groups = replay_show.load_shape(shape) if shape is not None else None

    def replayed(one_host: bool) -> ReplayResult:
        given = (settings, instances, routing, shared, model, size, compress_ratio, codec_speed)
        return replay_show.replay_settings(trace, *given, shared_host=one_host, shape=groups)

    result, apart = replayed(shared_host), replayed(False) if shared_host else None
    shown = replay_show.show_replay(result, parse_window(window), timed=cost is not None, apart=apart)
    output(shown.table, shown.json, shown.table, shown.notes, json, csv)


@commands.command()
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


@commands.command()
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
