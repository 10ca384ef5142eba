"""lmc sim sweep: many traces, policies, capacities and chunk sizes in parallel, into one Parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmc.cli.choices import BOUND, POLICIES, listed
from lmc.cli.sim_options import (
    CapacityBlocks,
    CapacityBytes,
    CapacityTokens,
    ChunkTokens,
    Csv,
    Json,
    TokenBytes,
    Window,
    capacity_options,
    output,
    parse_counts,
    split_list,
)
from lmc.cli.trace_source import TraceSource, reads_traces

commands = typer.Typer()


@commands.command()
@reads_traces
def sweep(
    sources: list[TraceSource],
    out: Annotated[
        Path,
        typer.Option("--output", "-o", help="Parquet file of the results. What it has already is not computed again."),
    ],
    policy: Annotated[
        str,
        typer.Option(
            help=f"Eviction policies, separated by commas: {listed((*POLICIES, BOUND))}. FILE.py:SPEC takes a policy of your own."
        ),
    ] = "lru",
    capacity_blocks: CapacityBlocks = None,
    capacity_tokens: CapacityTokens = None,
    capacity_bytes: CapacityBytes = None,
    token_bytes: TokenBytes = "0",
    chunk_tokens: ChunkTokens = None,
    window: Window = "all",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Jobs that run at the same time. By default one per core.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run the jobs on the Ray cluster at this address, such as 10.0.0.1:6379. With local, Ray starts here.",
        ),
    ] = None,
    json: Json = False,
    csv: Csv = None,
) -> None:
    """Count hits of many traces, in parallel.

    It counts by policy, capacity and chunk size. The same command goes on with a sweep that was killed.
    """
    from lmc.sim import sweep_summary
    from lmc.sim.shown import parse_window
    from lmc.sim.sweep_many import sweep_many
    from lmc.sim.trace_file import find_traces

    traces, notes = find_traces(source.file() for source in sources)
    capacities = capacity_options(capacity_blocks, capacity_tokens, capacity_bytes, token_bytes)
    done = sweep_many(
        traces, split_list(policy), capacities, out, parse_counts(chunk_tokens), parse_window(window), workers, ray
    )
    shown = sweep_summary.summary(done.rows, out, (*notes, *done.failures))
    output(shown.table, shown.json, sweep_summary.rows_table(done.rows), shown.notes, json, csv)
    if done.failures:
        raise typer.Exit(1)
